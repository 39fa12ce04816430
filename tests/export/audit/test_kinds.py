"""Every kind of site, each with its verdict and its gap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from evalmode.bundle.certificate import Severity
from evalmode.export.audit.audit import Audit, audit
from evalmode.export.audit.site import Kind, SiteReport
from tests.export.audit import zoo


def channels(x: Tensor) -> Tensor:
    return x[:, :, :1]


def samples(x: Tensor) -> Tensor:
    return x[:, :1, :1]


def steps(x: Tensor) -> Tensor:
    return x[:, :1]


def call(x: Tensor) -> Tensor:
    return x[:1, :1, :1]


# name: (factory, kind), and in WRONG the gap too (None where the kind has no gap)
RIGHT: dict[str, tuple[Callable[[], nn.Module], Kind]] = {
    "nn.Dropout": (lambda: nn.Dropout(0.3), Kind.INVERTED),
    "nn.Dropout at a rate of 1 in 1,000": (lambda: nn.Dropout(0.001), Kind.INVERTED),
    "nn.Dropout at a rate of 9 in 10": (lambda: nn.Dropout(0.9), Kind.INVERTED),
    "nn.Dropout in place": (lambda: nn.Dropout(0.3, inplace=True), Kind.INVERTED),
    "nn.Dropout1d": (lambda: nn.Dropout1d(0.3), Kind.INVERTED),
    "nn.Dropout2d": (lambda: Unsqueezed(nn.Dropout2d(0.3)), Kind.INVERTED),
    "nn.Dropout3d": (lambda: Unsqueezed(Unsqueezed(nn.Dropout3d(0.3))), Kind.INVERTED),
    "nn.AlphaDropout": (lambda: nn.AlphaDropout(0.2), Kind.ALPHA),
    "nn.FeatureAlphaDropout": (lambda: nn.FeatureAlphaDropout(0.2), Kind.ALPHA),
    "nn.RReLU": (lambda: nn.RReLU(), Kind.UNBIASED),
    "nn.Dropout with p = 0": (lambda: nn.Dropout(0.0), Kind.OFF),
    "nn.LSTM": (lambda: nn.LSTM(16, 8, 3, dropout=0.2, batch_first=True), Kind.INVERTED),
    "nn.GRU": (lambda: nn.GRU(16, 8, 2, dropout=0.2), Kind.INVERTED),
    "nn.RNN": (lambda: nn.RNN(16, 8, 2, dropout=0.2), Kind.INVERTED),
    "nn.MultiheadAttention with weights": (lambda: zoo.SelfAttention(weights=True), Kind.INVERTED),
    "nn.MultiheadAttention without weights": (
        lambda: zoo.SelfAttention(weights=False),
        Kind.INVERTED,
    ),
    "scaled_dot_product_attention": (lambda: zoo.Attention(), Kind.INVERTED),
    "F.dropout before a non-linear layer": (lambda: zoo.FeedForward(), Kind.INVERTED),
    "F.dropout before a square": (lambda: zoo.DoubleDrop(), Kind.INVERTED),
    "hand-written, scaled in training": (lambda: zoo.Masked(), Kind.INVERTED),
    "hand-written, scaled in eval": (
        lambda: zoo.Masked(train_scale=1.0, eval_scale=0.7),
        Kind.CLASSIC,
    ),
    "divided by p, which is one half": (lambda: zoo.Masked(0.5, train_scale=2.0), Kind.INVERTED),
    "torch.bernoulli": (lambda: zoo.Bernoulli(), Kind.INVERTED),
    "torch.distributions": (lambda: zoo.Distribution(), Kind.INVERTED),
    "a numpy generator": (lambda: zoo.NumpyMask(), Kind.INVERTED),
    "a torch generator of its own": (lambda: zoo.OwnTorchGenerator(), Kind.INVERTED),
    "torch.where": (lambda: zoo.Where(), Kind.INVERTED),
    "masked_fill": (lambda: zoo.MaskedFill(), Kind.INVERTED),
    "boolean index": (lambda: zoo.Indexed(), Kind.INVERTED),
    "floor of keep + rand": (lambda: zoo.Floor(), Kind.INVERTED),
    "one mask a channel": (lambda: zoo.Masked(like=channels), Kind.INVERTED),
    "one mask a sample": (lambda: zoo.Masked(like=samples), Kind.INVERTED),
    "one mask for all steps": (lambda: zoo.Masked(like=steps), Kind.INVERTED),
    "one mask for the whole call": (lambda: zoo.Masked(like=call), Kind.INVERTED),
    "a python gate around a branch": (lambda: zoo.PythonGate(), Kind.INVERTED),
    "one mask for all steps of a recurrence": (lambda: zoo.LockedCell(), Kind.INVERTED),
    "weights dropped": (lambda: zoo.WeightDrop(), Kind.INVERTED),
    "rows of an embedding dropped": (lambda: zoo.EmbeddingDropout(), Kind.INVERTED),
    "blocks dropped, the rest normalised": (lambda: zoo.DropBlock(), Kind.MULTIPLICATIVE),
    "Gaussian dropout": (lambda: zoo.Gaussian(), Kind.MULTIPLICATIVE),
    "uniform factors": (lambda: zoo.Uniform(), Kind.MULTIPLICATIVE),
    "additive noise": (lambda: zoo.Additive(), Kind.ADDITIVE),
    "draws with the data as probabilities": (lambda: zoo.Binarised(), Kind.UNBIASED),
    "two branches mixed at random": (lambda: zoo.ShakeShake(), Kind.UNBIASED),
    "zoneout": (lambda: zoo.Zoneout(), Kind.INVERTED),
    "rate on a schedule": (lambda: zoo.Scheduled(), Kind.INVERTED),
    "several tensors in and out": (lambda: zoo.CallsSeveral(), Kind.INVERTED),
    "one module, called twice": (lambda: zoo.Twice(), Kind.INVERTED),
    "one mask twice, scaled once": (lambda: zoo.SameMaskTwice(scales=1), Kind.INVERTED),
    "columns without replacement": (lambda: zoo.Scattered(scaled=True), Kind.INVERTED),
    "additive noise with a factor": (lambda: zoo.WeightedSum(), Kind.ADDITIVE),
    "a mask from a python list": (lambda: zoo.PythonList(scaled=True), Kind.INVERTED),
    "blocks normalised by a python number": (lambda: zoo.ItemNormalised(), Kind.UNBIASED),
    "bfloat16 inside float32": (lambda: zoo.HalfInside(), Kind.INVERTED),
    "half precision": (lambda: zoo.Cast(nn.Dropout(0.1), torch.float16), Kind.INVERTED),
    "bfloat16": (lambda: zoo.Cast(nn.Dropout(0.1), torch.bfloat16), Kind.INVERTED),
    "bfloat16, hand-written": (lambda: zoo.Cast(zoo.Masked(0.1), torch.bfloat16), Kind.INVERTED),
    "double precision": (lambda: zoo.Cast(nn.Dropout(0.1), torch.float64), Kind.INVERTED),
}

WRONG: dict[str, tuple[Callable[[], nn.Module], Kind, float | None]] = {
    "nothing scaled": (lambda: zoo.Masked(train_scale=1.0), Kind.UNSCALED, 0.7),
    "divided by p": (lambda: zoo.Masked(train_scale=1 / 0.3), Kind.WRONG_RATE, 0.7 / 0.3),
    "times p in eval": (
        lambda: zoo.Masked(train_scale=1.0, eval_scale=0.3),
        Kind.WRONG_RATE,
        0.7 / 0.3,
    ),
    "scaled in training and in eval": (
        lambda: zoo.Masked(eval_scale=0.7),
        Kind.SCALED_TWICE,
        1 / 0.7,
    ),
    "scaled twice in training": (
        lambda: zoo.Masked(train_scale=1 / 0.49),
        Kind.SCALED_TWICE,
        1 / 0.7,
    ),
    "kept at p, scaled for dropping at p": (
        lambda: zoo.Masked(0.2, drops=0.8),
        Kind.WRONG_RATE,
        0.25,
    ),
    "rate changed, scale not": (lambda: zoo.changed(0.4), Kind.WRONG_RATE, 0.6 / 0.9),
    "off by a quarter": (lambda: zoo.Masked(train_scale=1.25 / 0.7), Kind.WRONG_RATE, 1.25),
    "scaled down": (lambda: zoo.Masked(train_scale=0.7), Kind.WRONG_SCALE, 0.49),
    "one mask a sample, nothing scaled": (
        lambda: zoo.Masked(train_scale=1.0, like=samples),
        Kind.UNSCALED,
        0.7,
    ),
    "a numpy mask, nothing scaled": (lambda: zoo.NumpyMask(train_scale=1.0), Kind.UNSCALED, 0.7),
    "torch.where, nothing scaled": (lambda: zoo.Where(train_scale=1.0), Kind.UNSCALED, 0.7),
    "boolean index, nothing scaled": (lambda: zoo.Indexed(train_scale=1.0), Kind.UNSCALED, 0.7),
    "a python gate, nothing scaled": (lambda: zoo.PythonGate(scale=1.0), Kind.UNSCALED, 0.7),
    "before a non-linear layer, scaled once more": (
        lambda: zoo.FeedForward(scale=1.5),
        Kind.WRONG_RATE,
        1.5,
    ),
    "rows of an embedding, nothing scaled": (
        lambda: zoo.EmbeddingDropout(scaled=False),
        Kind.UNSCALED,
        0.8,
    ),
    "in a recurrence, nothing scaled": (lambda: zoo.LockedCell(scaled=False), Kind.UNSCALED, 0.8),
    "blocks dropped, nothing scaled": (lambda: zoo.DropBlock(scaled=False), Kind.UNSCALED, 0.78),
    "one mask twice, scaled twice": (lambda: zoo.SameMaskTwice(scales=2), Kind.SCALED_TWICE, 1.25),
    "columns without replacement, nothing scaled": (
        lambda: zoo.Scattered(scaled=False),
        Kind.UNSCALED,
        0.75,
    ),
    "a mask from a python list, nothing scaled": (
        lambda: zoo.PythonList(scaled=False),
        Kind.UNSCALED,
        0.8,
    ),
    "seeded in the forward": (lambda: zoo.Reseeded(), Kind.FROZEN, None),
    "Gaussian dropout around 1.2": (lambda: zoo.Gaussian(mean=1.2), Kind.WRONG_SCALE, 1.2),
    "additive noise with a bias": (lambda: zoo.Additive(0.2), Kind.WRONG_SCALE, None),
    "alpha dropout with a bias": (lambda: zoo.WrongAlpha(0.1), Kind.WRONG_SCALE, None),
    "rate on a schedule, scale not": (
        lambda: zoo.Scheduled(scale=1 / 0.9),
        Kind.WRONG_RATE,
        0.7 / 0.9,
    ),
    "nn.Dropout with p = 1": (lambda: nn.Dropout(1.0), Kind.DROPS_ALL, 0.0),
    "always on": (lambda: zoo.Always(), Kind.ALWAYS_ON, None),
    "attention that is always on": (lambda: zoo.AttentionAlways(), Kind.ALWAYS_ON, None),
    "in a plain list": (lambda: zoo.InAList(), Kind.ALWAYS_ON, None),
    "train() overridden": (lambda: zoo.Stubborn(0.3), Kind.ALWAYS_ON, None),
    "gumbel softmax": (lambda: zoo.Gumbel(), Kind.ALWAYS_ON, None),
    "the same mask each time": (lambda: zoo.Frozen(), Kind.FROZEN, None),
}

UNPROVEN: dict[str, Callable[[], nn.Module]] = {
    "keys dropped before the softmax": zoo.DropKey,
    "ids replaced": zoo.WordDropout,
    "half of the steps left out": zoo.PatchDropout,
    "not scaled before a normalisation": zoo.BeforeNorm,
}

WARNED: dict[str, tuple[Callable[[], nn.Module], Kind]] = {
    "never in training mode": (lambda: zoo.Shut(0.3), Kind.NEVER_ON),
    "an LSTM of one layer": (lambda: nn.LSTM(16, 8, 1, dropout=0.2), Kind.NEVER_ON),
    "never called": (lambda: zoo.Forgotten(), Kind.NOT_CALLED),
}


class Unsqueezed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.unsqueeze(-1))


class Root(nn.Module):
    """Passes its input to its part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> object:
        return self.part(x)


def audited(factory: Callable[[], nn.Module]) -> Audit:
    torch.manual_seed(0)
    return audit(Root(factory()), [{"x": torch.randn(32, 8, 16)}])


def worst(result: Audit) -> SiteReport:
    """The site with the highest severity: error, unproven, warning, none; of several, the last."""
    order = [Severity.ERROR, Severity.UNPROVEN, Severity.WARNING, None]
    return min(reversed(result.sites), key=lambda site: order.index(site.severity))


@pytest.mark.parametrize("name", RIGHT)
def test_a_site_without_a_gap_passes_under_its_name(name: str) -> None:
    factory, kind = RIGHT[name]
    result = audited(factory)
    site = worst(result)
    assert (site.kind, site.severity) == (kind, None), site
    assert result.record.verdict == "pass"
    if site.gap is not None and site.gap_interval is not None:
        assert site.gap_interval[0] < 1.02
        assert site.gap_interval[1] > 0.98


@pytest.mark.parametrize("name", WRONG)
def test_a_site_with_a_gap_fails_under_the_name_of_its_mistake(name: str) -> None:
    factory, kind, gap = WRONG[name]
    result = audited(factory)
    site = worst(result)
    assert (site.kind, site.severity) == (kind, Severity.ERROR), site
    assert result.record.verdict == "fail"
    assert site.fix
    if gap is not None:
        assert site.gap == pytest.approx(gap, rel=0.05)


@pytest.mark.parametrize("name", UNPROVEN)
def test_a_site_that_no_scale_describes_is_inconclusive_and_says_why(name: str) -> None:
    result = audited(UNPROVEN[name])
    site = worst(result)
    assert (site.kind, site.severity) == (Kind.INCONCLUSIVE, Severity.UNPROVEN), site
    assert result.record.verdict == "unproven"
    assert len(site.sentence.split()) > 5


@pytest.mark.parametrize("name", WARNED)
def test_a_dropout_that_does_nothing_is_a_warning(name: str) -> None:
    factory, kind = WARNED[name]
    result = audited(factory)
    site = worst(result)
    assert (site.kind, site.severity) == (kind, Severity.WARNING), site
    assert result.record.verdict == "pass"


def test_at_least_eighty_cases_are_covered() -> None:
    assert len(RIGHT) + len(WRONG) + len(UNPROVEN) + len(WARNED) >= 80
