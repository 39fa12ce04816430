"""Each call of a site is judged, with its arguments and the state of the site at that call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from evalmode.bundle.certificate import Severity, Verdict
from evalmode.export.audit.audit import Audit, audit
from evalmode.export.audit.find_sites import MOST_CALLS
from evalmode.export.audit.site import Kind

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def mask(x: Tensor, keep: float = 0.7) -> Tensor:
    return x * (torch.rand_like(x) < keep)


class ByArgument(nn.Module):
    def forward(self, x: Tensor, right: bool = True) -> Tensor:
        if not self.training:
            return x
        return mask(x) / 0.7 if right else mask(x)


class ByCounter(nn.Module):
    """Forgets to scale in every second call."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor, right: bool = True) -> Tensor:
        self.count += 1
        if not self.training:
            return x
        return mask(x) / 0.7 if self.count % 2 else mask(x)


class ByBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, right: bool = True) -> Tensor:
        self.count += 1
        if not self.training:
            return x
        return mask(x) / 0.7 if int(self.count) % 2 else mask(x)


class BySize(nn.Module):
    def forward(self, x: Tensor, right: bool = True) -> Tensor:
        if not self.training:
            return x
        return mask(x) / 0.7 if x.shape[1] == 8 else mask(x)


class ByValues(nn.Module):
    """Drops at another rate than it scales for, where values are never negative."""

    def forward(self, x: Tensor, right: bool = True) -> Tensor:
        if not self.training:
            return x
        return mask(x, 0.7 if bool((x < 0).any()) else 0.3) / 0.7


class Calls(nn.Module):
    """Two calls of one dropout: the second gets other arguments, sizes and values."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.drop, self.middle = drop, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x, True)
        return self.drop(self.middle(x).relu(), False)


def audited(module: nn.Module, *inputs: Tensor) -> Audit:
    torch.manual_seed(0)
    return audit(module, [{"x": x} for x in inputs or (X,)])


@pytest.mark.parametrize("site", [ByArgument, ByCounter, ByBuffer, BySize])
def test_a_second_call_that_is_not_scaled_is_a_gap_of_that_call(
    site: Callable[[], nn.Module],
) -> None:
    result = audited(Calls(site()))
    assert [(s.path, s.call, s.kind) for s in result.sites] == [
        ("drop", 0, Kind.INVERTED),
        ("drop", 2, Kind.UNSCALED),
    ]
    (finding,) = result.record.findings
    assert (finding.severity, finding.node) == (Severity.ERROR, "drop, call 2")
    assert result.record.sites[1] == f"drop, call 2 ({site.__name__}): unscaled"


def test_a_second_call_that_keeps_less_is_a_gap_of_that_call() -> None:
    result = audited(Calls(ByValues()))
    assert [(s.call, s.severity) for s in result.sites] == [(0, None), (2, Severity.ERROR)]
    assert result.sites[1].gap == pytest.approx(3 / 7, rel=0.1)


def test_a_second_call_whose_outputs_hide_the_scale_is_judged() -> None:
    class BeforeZeros(nn.Module):
        """A dropout before a layer of zeros, whose eval scale is wrong for 4 rows."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            nn.init.zeros_(self.layer.weight)
            nn.init.zeros_(self.layer.bias)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return self.layer(mask(x) / 0.7)
            return self.layer(x * 0.2 if len(x) == 4 else x)

    class CallsItTwice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = BeforeZeros()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.drop(x), self.drop(x[:4])

    assert [(s.call, s.severity) for s in audited(CallsItTwice()).sites] == [
        (0, None),
        (2, Severity.ERROR),
    ]


@pytest.mark.parametrize("factor", [0.0, 1.0], ids=["first on zeros", "first on values"])
def test_a_second_call_on_zeros_is_judged_on_random_values(factor: float) -> None:
    class WrongForFourRows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return mask(x) / 0.7
            return x * 0.2 if len(x) == 4 else x

    class CallsItOnZeros(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = WrongForFourRows()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.drop(x * factor), self.drop(torch.zeros_like(x[:4]))

    sites = audited(CallsItOnZeros()).sites
    # Of two calls on zeros one is captured.
    expected = [(0, None), (2, Severity.ERROR)] if factor else [(0, None)]
    assert [(site.call, site.severity) for site in sites] == expected


def test_a_wrong_first_call_and_a_right_second_call_have_two_verdicts() -> None:
    class Other(Calls):
        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.middle(self.drop(x, False)), True)

    assert [(s.call, s.kind) for s in audited(Other(ByArgument())).sites] == [
        (0, Kind.UNSCALED),
        (2, Kind.INVERTED),
    ]


def test_a_call_that_only_the_second_sample_makes_is_judged() -> None:
    assert [s.kind for s in audited(Long(), X[:4]).sites] == [Kind.INVERTED]
    assert [s.kind for s in audited(Long(), X[:4], X).sites] == [Kind.INVERTED, Kind.UNSCALED]


class Long(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = ByArgument()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x, len(x) < 8)


def test_calls_with_the_same_verdict_are_one_site() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(12):
                x = self.layer(x)
            return x

    (site,) = audited(Shared(), X, X[:4]).sites
    assert (site.kind, site.call_count, site.captured_count) == (Kind.INVERTED, 24, MOST_CALLS)


class Many(nn.Module):
    """Calls a dropout with `kinds` different arguments, the last of which is wrong."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.kinds, self.drop = kinds, Numbered(kinds - 1)

    def forward(self, x: Tensor) -> Tensor:
        for number in (*[0] * 20, *range(self.kinds)):
            x = self.drop(x, number)
        return x


class Numbered(nn.Module):
    def __init__(self, wrong: int) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: Tensor, number: int) -> Tensor:
        if not self.training:
            return x
        return mask(x, 0.99) / (1 if number == self.wrong else 0.99)


def test_a_late_call_of_another_kind_is_judged_before_those_that_repeat_one() -> None:
    result = audited(Many(MOST_CALLS))
    assert [s.kind for s in result.sites] == [Kind.INVERTED, Kind.UNSCALED]
    assert result.record.verdict is Verdict.FAIL


def test_calls_of_too_many_kinds_are_counted_and_unproven() -> None:
    result = audited(Many(MOST_CALLS + 3))
    (finding,) = result.record.findings
    assert (finding.severity, finding.node) == (Severity.UNPROVEN, "drop")
    assert "3 of its 31 calls were not looked at" in finding.why


def test_calls_that_differ_in_a_counter_alone_are_a_warning() -> None:
    class Counts(ByCounter):
        def forward(self, x: Tensor, right: bool = True) -> Tensor:
            self.count += 1
            return mask(x) / 0.7 if self.training else x

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = Counts()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(MOST_CALLS + 2):
                x = self.drop(x)
            return x

    result = audited(Loop())
    assert [(s.kind, s.captured_count) for s in result.sites] == [(Kind.INVERTED, MOST_CALLS)]
    (finding,) = result.record.findings
    assert (finding.severity, finding.node) == (Severity.WARNING, "drop")
    assert "2 of its 10 calls were not looked at" in finding.why
