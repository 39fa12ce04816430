"""The audit of whole modules: its report, and that it leaves the module as it was."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalmode.bundle.certificate import Severity
from evalmode.export.audit.audit import RULE, Audit, audit
from evalmode.export.audit.site import Kind
from evalmode.export.inputs.errors import UnusableInputs
from evalmode.model.transformer import Transformer
from tests.conftest import small_config
from tests.export.audit import zoo

X = {"x": torch.randn(32, 8, 16, generator=torch.Generator().manual_seed(0))}
SHARED = np.random.default_rng(5)


class Mixed(nn.Module):
    """Buffers, a counter, two own generators, a global generator, and a dropout in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.hidden = [nn.Dropout(0.2)]
        self.counted = zoo.Scheduled()
        self.own = zoo.NumpyMask()
        self.torchs = zoo.OwnTorchGenerator()

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(self.torchs(self.counted(self.hidden[0](self.norm(x)))))
        return x * float(SHARED.uniform(0.5, 1.5)) if self.training else x


class Uncopyable(Mixed):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Shares(nn.Module):
    """Its closure holds a module, which a deep copy does not copy."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.2))
        self.call = lambda x: inner(x)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def state_of(module: nn.Module) -> list[object]:
    flags: list[object] = [part.training for part in module.modules()]
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    grads = [parameter.grad for parameter in module.parameters()]
    numpys = np.random.get_state(legacy=False)["state"]["key"].tobytes()
    generators = [
        torch.get_rng_state().tolist(),
        random.getstate(),
        numpys,
        SHARED.bit_generator.state,
    ]
    if isinstance(module, Mixed):
        own = [
            module.own.generator.bit_generator.state,
            module.torchs.generator.get_state().tolist(),
        ]
        generators += [*own, module.counted.p, module.hidden[0].training]
    return [flags, {name: tensor.tolist() for name, tensor in tensors.items()}, grads, generators]


def verdicts(result: Audit) -> dict[str, Kind]:
    return {site.path: site.kind for site in result.sites}


@pytest.mark.parametrize("factory", [Mixed, Uncopyable, Shares])
@pytest.mark.parametrize("training", [True, False])
def test_the_module_and_every_generator_are_left_as_they_were(
    factory: Callable[[], nn.Module], training: bool
) -> None:
    module = factory().train(training)
    module(**X)
    before = state_of(module)
    result = audit(module, [X])
    assert len(result.sites) >= 1
    assert state_of(module) == before
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_module_that_raises_is_left_as_it_was() -> None:
    module = nn.Sequential(nn.Dropout(0.2), nn.Linear(3, 3)).eval()
    before = state_of(module)
    with pytest.raises(UnusableInputs):
        audit(module, [{"input": X["x"]}])
    assert state_of(module) == before


def test_a_module_that_cannot_be_copied_gets_the_same_verdicts() -> None:
    assert verdicts(audit(Uncopyable(), [X])) == verdicts(audit(Mixed(), [X]))


def test_the_same_seed_gives_the_same_audit_after_other_draws() -> None:
    module = nn.Sequential(nn.Dropout(0.2), zoo.NumpyMask(), zoo.PythonGate())
    first = audit(copy.deepcopy(module), [{"input": X["x"]}], draws=100)
    torch.rand(7), random.random(), np.random.rand(3)
    assert audit(module, [{"input": X["x"]}], draws=100) == first
    other = audit(module, [{"input": X["x"]}], draws=100, seed=1)
    assert other.sites[0].keep_rate != first.sites[0].keep_rate


def test_progress_gets_the_path_of_each_site_in_order() -> None:
    paths: list[str] = []
    module = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 16), nn.Dropout(0.0), zoo.Always())
    result = audit(module, [{"input": X["x"]}], progress=paths.append)
    assert paths == ["0", "2", "3"] == [site.path for site in result.sites]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 1.0}, "alpha"),
        ({"draws": 1}, "draws"),
        ({"samples": []}, "sample"),
    ],
)
def test_arguments_out_of_range_are_errors_that_name_them(
    wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        audit(nn.Dropout(0.1), **{"samples": [X], **wrong})  # type: ignore[arg-type]


def test_a_finding_names_the_gap_and_the_fix() -> None:
    result = audit(nn.Sequential(zoo.Masked(0.5, train_scale=1.0)), [{"input": X["x"]}])
    (site,), (finding,) = result.sites, result.record.findings
    assert "activations reach the next layer 2.0" in site.sentence
    assert "times larger in eval than in training" in site.sentence
    assert (finding.severity, finding.node, finding.op) == (Severity.ERROR, "0", "Masked")
    assert "1 - p = 0.5" in finding.fix
    assert result.record.rule == RULE
    assert result.record.sites == ("0 (Masked): unscaled",)


def test_the_figures_of_a_site_agree_with_each_other() -> None:
    (site,) = audit(nn.Dropout(0.2), [{"input": X["x"]}]).sites
    assert (site.path, site.type, site.p, site.call_count) == ("", "Dropout", 0.2, 1)
    assert site.train_scale == pytest.approx(1.25)
    assert site.eval_scale == 1.0
    assert site.keep_rate is not None
    assert site.keep_interval is not None
    assert site.keep_interval[0] < 0.8 < site.keep_interval[1]
    assert site.gap == pytest.approx(site.keep_rate * 1.25)


def test_a_keep_probability_passed_as_p_is_reported() -> None:
    (high_rate,) = audit(nn.Dropout(0.8), [{"input": X["x"]}]).sites
    assert "papers often call the keep probability p" in high_rate.sentence
    (keep_rate_as_p,) = audit(zoo.Masked(0.2, drops=0.8), [X]).sites
    assert keep_rate_as_p.severity is Severity.ERROR
    assert "p = 0.2 is what it keeps, not what it drops" in keep_rate_as_p.sentence


def test_two_dropouts_in_one_forward_are_two_sites_and_each_has_its_own_verdict() -> None:
    first, second = audit(zoo.TwoRates(second=1.0), [X]).sites
    assert (first.source, first.kind) == ("1 of 2", Kind.INVERTED)
    assert (second.source, second.kind) == ("2 of 2", Kind.UNSCALED)
    assert second.gap == pytest.approx(0.6, rel=0.05)
    good = audit(zoo.TwoRates(second=1 / 0.6), [X])
    assert good.record.verdict == "pass"


def test_a_mostly_zero_input_hides_no_gap() -> None:
    sparse = {"x": F.relu(X["x"] - 1.5)}
    assert audit(zoo.Masked(), [sparse]).record.verdict == "pass"
    (site,) = audit(zoo.Masked(train_scale=1.0), [sparse]).sites
    assert site.kind is Kind.UNSCALED
    (gated,) = audit(zoo.PythonGate(), [sparse]).sites
    assert gated.severity is None


def test_the_calls_of_all_samples_are_counted() -> None:
    (site,) = audit(zoo.Twice(), [X, {"x": X["x"][:4]}, X]).sites
    assert site.call_count == 6


def test_all_sites_of_torchs_encoder_layer_pass() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    result = audit(layer, [{"src": X["x"]}])
    assert verdicts(result) == dict.fromkeys(
        ("self_attn", "dropout", "dropout1", "dropout2"), Kind.INVERTED
    )


def test_our_own_transformer_passes() -> None:
    torch.manual_seed(0)
    config = small_config()
    ids = torch.randint(1, config.vocabulary, (16, 8, 16))
    result = audit(Transformer(config), [{"input_ids": ids}])
    assert result.record.verdict == "pass", result.record
    assert len(result.sites) > 5


def test_a_module_without_dropout_has_no_site_and_passes() -> None:
    result = audit(nn.Linear(16, 16), [{"input": X["x"]}])
    assert result.sites == ()
    assert result.record.verdict == "pass"


def test_a_dropout_whose_rate_the_parent_uses_need_not_be_called() -> None:
    result = audit(zoo.Hidden(), [X])
    assert verdicts(result) == {"": Kind.INVERTED, "dropout": Kind.NOT_CALLED}
    assert result.record.findings == ()


def test_too_few_draws_are_inconclusive() -> None:
    site = zoo.Masked(0.1, like=lambda x: x[:, :1, :1])
    assert audit(site, [X], draws=4).record.verdict == "unproven"
    assert audit(site, [X], draws=4).sites[0].forward_count == 4
    assert audit(site, [X]).record.verdict == "pass"


def network(*parts: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*parts)


BEFORE_NORM = {
    "at once": network(nn.Dropout(0.3), nn.BatchNorm1d(32)),
    "over a layer": network(nn.Dropout(0.3), nn.Linear(32, 32), nn.ReLU(), nn.BatchNorm1d(32)),
    "hand-written": network(zoo.Masked(0.3), nn.BatchNorm1d(32)),
}
NOT_BEFORE_NORM = {
    "after it": network(nn.BatchNorm1d(32), nn.Dropout(0.3)),
    "before a layer norm": network(nn.Dropout(0.3), nn.LayerNorm(32)),
    "before a norm without running statistics": network(
        nn.Dropout(0.3), nn.BatchNorm1d(32, track_running_stats=False)
    ),
}
ROWS = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BEFORE_NORM)
def test_dropout_that_feeds_a_batch_norm_is_a_warning_with_the_shift(name: str) -> None:
    result = audit(BEFORE_NORM[name], [{"input": ROWS}])
    (finding,) = result.record.findings
    assert (finding.severity, finding.node) == (Severity.WARNING, "0")
    assert "times the variance" in finding.why
    assert result.record.verdict == "pass"


def test_the_variance_shift_is_that_of_theory() -> None:
    # Var(m x / k) = E[x^2] / k - E[x]^2, which for a mean of 0 is Var(x) / k.
    (finding,) = audit(BEFORE_NORM["at once"], [{"input": ROWS}]).record.findings
    ratio = float(finding.why.partition("input has ")[2].split()[0])
    assert ratio == pytest.approx(1 / 0.7, rel=0.03)


@pytest.mark.parametrize("name", NOT_BEFORE_NORM)
def test_a_dropout_elsewhere_gets_no_variance_warning(name: str) -> None:
    assert audit(NOT_BEFORE_NORM[name], [{"input": ROWS}]).record.findings == ()


@dataclass
class Answer:
    logits: Tensor


class AnswersWithAnObject(nn.Module):
    def forward(self, x: Tensor) -> Answer:
        return Answer(F.dropout(x, 0.2, self.training))


def test_an_output_of_the_users_own_class_is_read() -> None:
    assert verdicts(audit(AnswersWithAnObject(), [X])) == {"": Kind.INVERTED}


class MakesItself(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Dropout(0.2)(x)


def test_a_dropout_created_in_the_forward_is_reported_at_its_creator_as_always_on() -> None:
    assert verdicts(audit(MakesItself(), [X])) == {"": Kind.ALWAYS_ON}


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


def test_a_forward_that_cannot_be_watched_is_unproven() -> None:
    result = audit(nn.Sequential(nn.Dropout(0.2), Branches()), [{"input": X["x"]}])
    assert result.record.verdict == "unproven"


class Fused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, 0.2, self.training)[0].square()


def test_the_fused_dropout_of_gpus_is_judged() -> None:
    (site,) = audit(Fused(), [X]).sites
    assert (site.kind, site.train_scale) == (Kind.INVERTED, pytest.approx(1.25))


class AsksItsChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.2, self.child.training)


def test_a_site_that_reads_the_flag_of_its_child_is_judged() -> None:
    assert verdicts(audit(AsksItsChild(), [X])) == {"": Kind.INVERTED}


class AroundRandom(nn.Module):
    """A dropout of its own, around a module that is always random."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.Always()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.inner(x), 0.2, self.training)


def test_a_site_around_a_module_that_is_always_random_is_inconclusive() -> None:
    assert verdicts(audit(AroundRandom(), [X])) == {"": Kind.INCONCLUSIVE, "inner": Kind.ALWAYS_ON}
