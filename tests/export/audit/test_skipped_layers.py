"""LayerDrop: layers skipped in training, alone and beside other noise, and other random paths."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalmode.bundle.certificate import Severity, Verdict
from evalmode.export.audit.audit import Audit, audit
from evalmode.export.audit.site import Kind

X = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """A residual layer; `tuples` makes it return a tuple."""

    def __init__(self, drop: nn.Module, *, tuples: bool = False) -> None:
        super().__init__()
        self.norm, self.linear, self.drop = nn.LayerNorm(8), nn.Linear(8, 8), drop
        self.tuples = tuples

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, None]:
        x = x + self.drop(self.linear(self.norm(x)).relu())
        return (x, None) if self.tuples else x


class Unscaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) >= 0.2) if self.training else x


SOURCES: dict[str, Callable[[], float | Tensor]] = {
    "torch": lambda: torch.rand([]),
    "torch, as a number": lambda: torch.rand(1).item(),
    "python": random.random,
    "numpy": np.random.random,
}


class Encoder(nn.Module):
    def __init__(
        self,
        layerdrop: float = 0.2,
        *,
        layers: int = 3,
        source: str = "torch",
        tuples: bool = False,
        rescaled: bool = False,
        own_dropout: float | None = None,
        inner: Callable[[], nn.Module] = lambda: nn.Dropout(0.1),
        always_draws: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(inner(), tuples=tuples) for _ in range(layers))
        self.norm, self.layerdrop, self.source = nn.LayerNorm(8), layerdrop, SOURCES[source]
        self.rescaled, self.own_dropout, self.always_draws = rescaled, own_dropout, always_draws

    def forward(self, x: Tensor) -> Tensor:
        if self.own_dropout is not None:
            x = x * (torch.rand_like(x) < 0.5) * self.own_dropout if self.training else x
        for layer in self.layers:
            drawn = self.source() if self.training or self.always_draws else 1.0
            if self.training and drawn < self.layerdrop:
                continue
            answer = layer(x)
            answer = answer[0] if isinstance(answer, tuple) else answer
            if self.rescaled and self.training:
                answer = x + (answer - x) / (1 - self.layerdrop)
            x = answer
        return self.norm(x)


def audited(encoder: nn.Module) -> Audit:
    torch.manual_seed(0)
    return audit(nn.Sequential(nn.Linear(8, 8), encoder, nn.Linear(8, 2)), [{"input": X}])


def kinds(result: Audit) -> list[Kind]:
    return [site.kind for site in result.sites if site.path == "1"]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("layerdrop", [0.1, 0.5])
def test_layers_that_are_skipped_are_a_warning_that_names_the_design(
    layerdrop: float, source: str
) -> None:
    result = audited(Encoder(layerdrop, source=source))
    assert kinds(result) == [Kind.LAYERS_SKIPPED]
    (finding,) = result.record.findings
    assert (finding.severity, finding.op) == (Severity.WARNING, "Encoder")
    assert f"p = {layerdrop:g}" in finding.why
    assert "LayerDrop" in finding.why
    assert result.record.verdict is Verdict.PASS


@pytest.mark.parametrize(
    "options", [{"tuples": True}, {"layers": 1}, {"layers": 8}, {"always_draws": True}], ids=str
)
def test_skipped_layers_are_recognised_in_any_form(options: dict[str, bool | int]) -> None:
    result = audited(Encoder(**options))  # type: ignore[arg-type]
    assert kinds(result) == [Kind.LAYERS_SKIPPED]
    assert result.record.verdict is Verdict.PASS


def test_sites_inside_of_layers_that_are_often_skipped_are_judged() -> None:
    result = audited(Encoder(0.7, layers=4, inner=Unscaled))
    inside = [site for site in result.sites if site.path.startswith("1.layers")]
    assert [site.kind for site in inside] == [Kind.UNSCALED] * 4
    assert result.record.verdict is Verdict.FAIL


def test_skipped_layers_with_a_scale_are_no_finding() -> None:
    result = audited(Encoder(0.25, rescaled=True))
    assert kinds(result) == [Kind.INVERTED]
    assert result.record.findings == ()


@pytest.mark.parametrize(("scale", "kind"), [(2.0, Kind.INVERTED), (1.0, Kind.UNSCALED)])
def test_a_dropout_beside_skipped_layers_has_a_separate_verdict(scale: float, kind: Kind) -> None:
    assert kinds(audited(Encoder(own_dropout=scale))) == [Kind.LAYERS_SKIPPED, kind]


def test_a_factor_beside_skipped_layers_does_not_pass() -> None:
    class Scaled(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x if self.training else x * 0.8

    assert audited(Scaled()).record.verdict is not Verdict.PASS


class Branch(nn.Module):
    """Stochastic depth inside the block: it skips its branch, not a layer."""

    def __init__(self, *, scaled: bool) -> None:
        super().__init__()
        self.linear, self.p, self.scaled = nn.Linear(8, 8), 0.3, scaled

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x + F.relu(self.linear(x))
        if torch.rand([]) < self.p:
            return x
        return x + F.relu(self.linear(x)) / (1 - self.p if self.scaled else 1)


@pytest.mark.parametrize(("scaled", "kind"), [(True, Kind.INVERTED), (False, Kind.UNSCALED)])
def test_a_skipped_branch_is_no_layer_and_must_be_scaled(scaled: bool, kind: Kind) -> None:
    assert kinds(audited(Branch(scaled=scaled))) == [kind]


class RandomOrder(nn.Module):
    """Skips a layer and doubles its input instead: more than a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out = random.randrange(4) if self.training else 3
        for index, layer in enumerate(self.layers):
            x = x * 2 if index == out else layer(x).relu()
        return x


def test_other_random_paths_are_not_layer_drop() -> None:
    result = audited(RandomOrder())
    assert kinds(result) == [Kind.INCONCLUSIVE]
    assert result.record.verdict is Verdict.UNPROVEN


class Rare(nn.Module):
    """A dropout in one forward of fifty: no probe sees it, and a later forward does."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 0.02:
            x = F.dropout(x, 0.5)
        return F.dropout(x, 0.5, self.training)


def test_a_rare_path_raises_no_error() -> None:
    result = audited(Rare())
    assert result.record.verdict in (Verdict.PASS, Verdict.UNPROVEN)
    assert all("IndexError" not in site.sentence for site in result.sites)
