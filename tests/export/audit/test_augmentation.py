"""SpecAugment and similar masks are augmentation; a dropout beside them is still judged."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalmode.bundle.certificate import Severity, Verdict
from evalmode.export.audit.audit import Audit, audit
from evalmode.export.audit.site import Kind

X = torch.randn(4, 20, 8, generator=torch.Generator().manual_seed(0))


def spans(rows: int, length: int, width: int = 4) -> Tensor:
    """One span per row, at a position that NumPy draws."""
    starts = np.random.randint(0, length - width + 1, size=rows)
    steps = np.arange(length)[None]
    return torch.tensor((steps >= starts[:, None]) & (steps < starts[:, None] + width))


class Learned(nn.Module):
    """Spans of time steps become a learned vector."""

    def __init__(self, way: str, factor: float = 1.0) -> None:
        super().__init__()
        self.way, self.factor = way, factor
        self.vector, self.linear = nn.Parameter(torch.rand(8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if not self.training:
            return x * self.factor
        dropped = spans(*x.shape[:2])
        if self.way == "index":
            x[dropped] = self.vector
            return x
        if self.way == "where":
            return torch.where(dropped[..., None], self.vector, x)
        return torch.where(~dropped[..., None], x, self.vector.expand_as(x))


class SpecAugment(nn.Module):
    """Spans of time steps and of features become zeros."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        x = x.masked_fill(spans(*x.shape[:2])[..., None], 0)
        return x.masked_fill(spans(x.shape[0], x.shape[2], 2)[:, None].expand_as(x), 0)


class Plain(nn.Module):
    """The same without a telling name; `configured` adds a telling configuration."""

    def __init__(self, *, configured: bool = False) -> None:
        super().__init__()
        if configured:
            self.config = SimpleNamespace(apply_spec_augment=True)

    forward = SpecAugment.forward


def audited(module: nn.Module) -> Audit:
    torch.manual_seed(0)
    return audit(nn.Sequential(nn.Linear(8, 8), module, nn.Linear(8, 2)), [{"input": X}])


def kinds(result: Audit) -> list[Kind]:
    return [site.kind for site in result.sites]


@pytest.mark.parametrize("way", ["index", "where", "where not"])
def test_values_that_become_a_learned_vector_are_augmentation(way: str) -> None:
    result = audited(Learned(way))
    assert kinds(result) == [Kind.AUGMENTED]
    (finding,) = result.record.findings
    assert (finding.severity, finding.node) == (Severity.WARNING, "1")
    assert "20 % of its values" in finding.why
    assert result.record.verdict is Verdict.PASS


def test_a_learned_vector_that_is_still_zero_is_augmentation() -> None:
    module = Learned("index")
    nn.init.zeros_(module.vector)
    assert kinds(audited(module)) == [Kind.AUGMENTED]


def test_a_factor_in_eval_beside_the_augmentation_is_a_gap() -> None:
    assert kinds(audited(Learned("index", factor=0.5))) == [Kind.WRONG_SCALE]


@pytest.mark.parametrize("module", [SpecAugment(), Plain(configured=True)], ids=["name", "config"])
def test_spans_that_become_zeros_are_augmentation_where_the_module_says_so(
    module: nn.Module,
) -> None:
    result = audited(module)
    assert kinds(result) == [Kind.AUGMENTED] * 2
    assert result.record.verdict is Verdict.PASS


@pytest.mark.parametrize("with_layer", [False, True], ids=["mask alone", "mask and layer"])
def test_one_mask_of_zeros_is_augmentation_with_and_without_a_layer_in_the_module(
    with_layer: bool,
) -> None:
    class TimeMasking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8) if with_layer else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return x.masked_fill(spans(*x.shape[:2])[..., None], 0) if self.training else x

    result = audited(TimeMasking())
    assert kinds(result) == [Kind.AUGMENTED]
    assert [finding.severity for finding in result.record.findings] == [Severity.WARNING]


def test_spans_that_become_zeros_fail_where_no_name_says_augmentation() -> None:
    assert audited(Plain()).record.verdict is Verdict.FAIL


def test_a_dropout_of_single_elements_is_not_excused_by_the_name() -> None:
    class SpecAugmentAndDropout(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (torch.rand_like(x) >= 0.3) if self.training else x

    assert kinds(audited(SpecAugmentAndDropout())) == [Kind.UNSCALED]


def test_a_dropout_beside_the_augmentation_has_a_separate_verdict() -> None:
    class Both(Learned):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.2, self.training)

    assert sorted(kinds(audited(Both("index")))) == [Kind.AUGMENTED, Kind.INVERTED]


def test_values_that_become_minus_infinity_before_a_softmax_are_no_augmentation() -> None:
    class DropsKeys(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scores = x @ x.transpose(1, 2)
            if self.training:
                scores = scores.masked_fill(torch.rand_like(scores) < 0.1, -torch.inf)
            return scores.softmax(-1).nan_to_num() @ x

    assert kinds(audited(DropsKeys())) == [Kind.INCONCLUSIVE]


@pytest.mark.parametrize("of_torch", [True, False], ids=["zeros_like", "a buffer of zeros"])
def test_zeros_that_are_no_parameter_are_a_dropout(of_torch: bool) -> None:
    class Blanks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("blank", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return x.tanh()
            blank = torch.zeros_like(x) if of_torch else self.blank
            return torch.where(torch.rand_like(x) < 0.3, blank, x).tanh()

    assert kinds(audited(Blanks())) == [Kind.UNSCALED]
