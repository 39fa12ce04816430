"""Inputs on which no mask is visible: the site is inconclusive, with the reason. Zeros are replaced
by random values, and the sentence says so.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalmode.bundle.certificate import Severity
from evalmode.export.audit.audit import audit
from evalmode.export.audit.site import Kind, SiteReport
from tests.export.audit import zoo

X = torch.randn(32, 8, 16, generator=torch.Generator().manual_seed(0))
INF = torch.full_like(X, torch.inf)
NOTHING = {
    "NaN": (torch.full_like(X, torch.nan), "without a finite value"),
    "infinity": (INF, "without a finite value"),
    "both infinities": (torch.where(X > 0, INF, -INF), "without a finite value"),
    "zeros and NaN": (
        torch.zeros_like(X).index_fill(0, torch.tensor([3]), torch.nan),
        "zero where it is finite",
    ),
    "no rows": (X[:0], "empty"),
}


class Unscaled(nn.Dropout):
    """A dropout by name, so that it is a site even where it does not draw."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) >= self.p) if self.training else x


class Root(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)


class Dead(nn.Module):
    """A ReLU whose output is 0."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x - 100)


def site_of(module: nn.Module, *samples: Tensor) -> SiteReport:
    (site,) = audit(Root(module), [{"x": x} for x in samples]).sites
    return site


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("factory", [Unscaled, nn.Dropout, zoo.Shut, nn.AlphaDropout])
def test_an_input_that_shows_no_mask_is_inconclusive_with_the_reason(
    factory: type[nn.Dropout | nn.AlphaDropout], name: str
) -> None:
    x, reason = NOTHING[name]
    result = audit(Root(factory(0.5)), [{"x": x}])
    site = result.sites[0]
    assert (site.kind, site.severity) == (Kind.INCONCLUSIVE, Severity.UNPROVEN)
    assert (
        site.sentence
        == f"its input is {reason}, so nothing can be measured: give samples that reach it"
    )
    assert site.fix == "give samples that reach it"
    assert result.record.verdict == "unproven"


ZEROS = torch.zeros_like(X)


@pytest.mark.parametrize(
    ("factory", "kind"),
    [
        (Unscaled, Kind.UNSCALED),
        (nn.Dropout, Kind.INVERTED),
        (zoo.Shut, Kind.NEVER_ON),
        (nn.AlphaDropout, Kind.ALPHA),
    ],
)
def test_random_values_replace_an_input_of_zeros(
    factory: type[nn.Dropout | nn.AlphaDropout], kind: Kind
) -> None:
    site = site_of(factory(0.5), ZEROS)
    assert site.kind is kind
    assert site.sentence.endswith(
        "(measured with random values, because its input is zero everywhere)"
    )


def test_an_unscaled_dropout_behind_a_dead_relu_fails() -> None:
    result = audit(Root(Dead(), Unscaled(0.5)), [{"x": X}])
    assert result.record.verdict == "fail"


class DropPath(nn.Module):
    """A branch dropped for a whole row."""

    def __init__(self, keep: float, scale: float) -> None:
        super().__init__()
        self.keep, self.scale = keep, scale

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(len(x), *[1] * (x.dim() - 1)) < self.keep) * self.scale


class Block(nn.Module):
    """A residual block whose last normalisation starts at zero: its branch gives nothing."""

    def __init__(self, scale: float, *, inside: bool) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
        nn.init.zeros_(self.norm.weight)
        self.path = DropPath(0.8, scale)
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm(self.linear(x))
        if not self.inside:
            return x + self.path(branch)
        if not self.training:
            return x + branch
        return x + branch * (torch.rand(len(x), 1, 1) < 0.8) * self.path.scale


@pytest.mark.parametrize("inside", [False, True], ids=["a module", "in the block"])
@pytest.mark.parametrize(("scale", "kind"), [(1.25, Kind.INVERTED), (1.0, Kind.UNSCALED)])
def test_a_branch_that_is_zero_at_the_start_is_judged(
    scale: float, kind: Kind, inside: bool
) -> None:
    block = Block(scale, inside=inside)
    result = audit(Root(block), [{"x": X}])
    (site,) = result.sites
    assert site.kind is kind
    assert "measured with random values" in site.sentence
    assert not block.norm.weight.any()


def test_after_an_inconclusive_attempt_on_random_weights_later_calls_are_judged_in_full() -> None:
    class ZeroBranch(nn.Module):
        """A branch with zero weights, whose eval scale is wrong for a batch of 4 rows."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                dropped = x * (torch.rand_like(x[:, :1, :1]) < 0.9) / 0.9
            else:
                dropped = x * 0.2 if len(x) == 4 else x
            return x + dropped @ self.weight

    class CallsItTwice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = ZeroBranch()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.branch(x), self.branch(x[:4])

    # Four draws are too few to judge the first call, and enough for the gap of the second.
    result = audit(CallsItTwice(), [{"x": X}], draws=4)
    assert [(site.call, site.severity) for site in result.sites] == [
        (0, Severity.UNPROVEN),
        (2, Severity.ERROR),
    ]


def test_a_draw_that_changes_no_output_is_inconclusive() -> None:
    class DeadInside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(x - 100)
            return x * (torch.rand_like(x) >= 0.5) if self.training else x

    site = site_of(DeadInside(), X)
    assert site.kind is Kind.INCONCLUSIVE
    assert (
        site.sentence
        == "it draws random numbers, and its output in training is eval's in every forward"
    )


def test_a_sample_with_values_is_measured_among_samples_without() -> None:
    nans = torch.full_like(X, torch.nan)
    assert site_of(Unscaled(0.5), nans, X).kind is Kind.UNSCALED
    assert site_of(nn.Dropout(0.5), X[:0], nans, X).kind is Kind.INVERTED
    assert site_of(Unscaled(0.5), nans, X[:0]).kind is Kind.INCONCLUSIVE


def test_samples_without_rows_are_unproven_although_no_site_is_found() -> None:
    result = audit(zoo.Masked(0.5, train_scale=1.0), [{"x": X[:0]}, {"x": X[:0]}])
    assert result.sites == ()
    assert result.record.verdict == "unproven"
    assert "every sample is empty" in result.record.findings[0].why
    assert audit(zoo.Masked(0.5), [{"x": X[:0]}, {"x": X}]).record.verdict == "pass"


@pytest.mark.parametrize("module", [zoo.Shut(0.3), Root(zoo.Shut(0.3))], ids=["alone", "inside"])
def test_a_dropout_that_never_draws_is_never_on(module: nn.Module) -> None:
    site = site_of(module, X)
    assert (site.kind, site.severity) == (Kind.NEVER_ON, Severity.WARNING)
    sparse = torch.zeros_like(X)
    sparse[0, 0, 0] = 1
    assert site_of(module, sparse).kind is Kind.NEVER_ON


def test_a_site_with_a_bias_is_measured_on_an_input_of_zeros() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            return x * (torch.rand_like(x) >= 0.5) if self.training else x

    assert site_of(Biased(), torch.zeros_like(X)).kind is Kind.UNSCALED
