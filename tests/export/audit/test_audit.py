"""What an audit says as a whole, and that it leaves no trace."""

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
    """Buffers, a counter, a generator of its own, a global one, and a dropout in a list."""

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


def verdicts(found: Audit) -> dict[str, Kind]:
    return {site.path: site.kind for site in found.sites}


@pytest.mark.parametrize("factory", [Mixed, Uncopyable, Shares])
@pytest.mark.parametrize("training", [True, False])
def test_the_module_and_every_generator_are_left_as_they_were(
    factory: Callable[[], nn.Module], training: bool
) -> None:
    module = factory().train(training)
    module(**X)
    before = state_of(module)
    found = audit(module, [X])
    assert len(found.sites) >= 1
    assert state_of(module) == before
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_everything_is_left_as_it_was_when_the_module_raises() -> None:
    module = nn.Sequential(nn.Dropout(0.2), nn.Linear(3, 3)).eval()
    before = state_of(module)
    with pytest.raises(UnusableInputs):
        audit(module, [{"input": X["x"]}])
    assert state_of(module) == before


def test_the_audit_of_a_module_that_cannot_be_copied_is_that_of_its_twin() -> None:
    assert verdicts(audit(Uncopyable(), [X])) == verdicts(audit(Mixed(), [X]))


def test_the_same_seed_gives_the_same_audit_whatever_was_drawn_before() -> None:
    module = nn.Sequential(nn.Dropout(0.2), zoo.NumpyMask(), zoo.PythonGate())
    first = audit(copy.deepcopy(module), [{"input": X["x"]}], draws=100)
    torch.rand(7), random.random(), np.random.rand(3)
    assert audit(module, [{"input": X["x"]}], draws=100) == first
    other = audit(module, [{"input": X["x"]}], draws=100, seed=1)
    assert other.sites[0].keep_rate != first.sites[0].keep_rate


def test_progress_hears_of_every_site_in_order() -> None:
    heard: list[str] = []
    module = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 16), nn.Dropout(0.0), zoo.Always())
    found = audit(module, [{"input": X["x"]}], progress=heard.append)
    assert heard == ["0", "2", "3"] == [site.path for site in found.sites]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 1.0}, "alpha"),
        ({"draws": 1}, "draws"),
        ({"samples": []}, "sample"),
    ],
)
def test_what_cannot_be_audited_is_refused_by_name(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audit(nn.Dropout(0.1), **{"samples": [X], **wrong})  # type: ignore[arg-type]


def test_a_gap_is_told_in_the_users_terms_with_what_to_do_about_it() -> None:
    found = audit(nn.Sequential(zoo.Masked(0.5, train_scale=1.0)), [{"input": X["x"]}])
    (site,), (finding,) = found.sites, found.record.findings
    assert "activations reach the next layer 2.0" in site.sentence
    assert "times larger in eval than in training" in site.sentence
    assert (finding.severity, finding.node, finding.op) == (Severity.ERROR, "0", "Masked")
    assert "1 - p = 0.5" in finding.fix
    assert found.record.rule == RULE
    assert found.record.sites == ("0 (Masked): unscaled",)


def test_the_figures_of_a_site_agree_with_one_another() -> None:
    (site,) = audit(nn.Dropout(0.2), [{"input": X["x"]}]).sites
    assert (site.path, site.type, site.p, site.calls) == ("", "Dropout", 0.2, 1)
    assert site.train_scale == pytest.approx(1.25)
    assert site.eval_scale == 1.0
    assert site.keep_rate is not None
    assert site.keep_interval is not None
    assert site.keep_interval[0] < 0.8 < site.keep_interval[1]
    assert site.gap == pytest.approx(site.keep_rate * 1.25)


def test_a_keep_probability_given_as_p_is_named() -> None:
    (dropped,) = audit(nn.Dropout(0.8), [{"input": X["x"]}]).sites
    assert "papers often call the keep probability p" in dropped.sentence
    (kept,) = audit(zoo.Masked(0.2, drops=0.8), [X]).sites
    assert kept.severity is Severity.ERROR
    assert "p = 0.2 is what it keeps, not what it drops" in kept.sentence


def test_two_dropouts_in_one_forward_are_two_sites_and_each_has_its_own_verdict() -> None:
    first, second = audit(zoo.TwoRates(second=1.0), [X]).sites
    assert (first.draw, first.kind) == ("1 of 2", Kind.INVERTED)
    assert (second.draw, second.kind) == ("2 of 2", Kind.UNSCALED)
    assert second.gap == pytest.approx(0.6, rel=0.05)
    good = audit(zoo.TwoRates(second=1 / 0.6), [X])
    assert good.record.verdict == "pass"


def test_an_input_that_is_mostly_zero_hides_nothing() -> None:
    sparse = {"x": F.relu(X["x"] - 1.5)}
    assert audit(zoo.Masked(), [sparse]).record.verdict == "pass"
    (site,) = audit(zoo.Masked(train_scale=1.0), [sparse]).sites
    assert site.kind is Kind.UNSCALED
    (gated,) = audit(zoo.PythonGate(), [sparse]).sites
    assert gated.severity is None


def test_every_sample_is_called_and_the_calls_are_counted() -> None:
    (site,) = audit(zoo.Twice(), [X, {"x": X["x"][:4]}, X]).sites
    assert site.calls == 6


def test_torchs_own_encoder_layer_passes_with_all_of_its_sites() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    found = audit(layer, [{"src": X["x"]}])
    assert verdicts(found) == dict.fromkeys(
        ("self_attn", "dropout", "dropout1", "dropout2"), Kind.INVERTED
    )


def test_our_own_transformer_passes() -> None:
    torch.manual_seed(0)
    config = small_config()
    ids = torch.randint(1, config.vocabulary, (16, 8, 16))
    found = audit(Transformer(config), [{"input_ids": ids}])
    assert found.record.verdict == "pass", found.record
    assert len(found.sites) > 5


def test_a_module_without_dropout_has_no_site_and_passes() -> None:
    found = audit(nn.Linear(16, 16), [{"input": X["x"]}])
    assert found.sites == ()
    assert found.record.verdict == "pass"


def test_a_rate_handed_to_a_function_needs_no_call_of_the_dropout_that_holds_it() -> None:
    found = audit(zoo.Hidden(), [X])
    assert verdicts(found) == {"": Kind.INVERTED, "dropout": Kind.NOT_CALLED}
    assert found.record.findings == ()


def test_too_few_draws_are_inconclusive_and_not_fine() -> None:
    site = zoo.Masked(0.1, like=lambda x: x[:, :1, :1])
    assert audit(site, [X], draws=4).record.verdict == "unproven"
    assert audit(site, [X], draws=4).sites[0].draws == 4
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
    "before one that normalises by the batch in eval too": network(
        nn.Dropout(0.3), nn.BatchNorm1d(32, track_running_stats=False)
    ),
}
ROWS = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BEFORE_NORM)
def test_dropout_that_feeds_a_batch_norm_is_a_warning_with_the_shift(name: str) -> None:
    found = audit(BEFORE_NORM[name], [{"input": ROWS}])
    (finding,) = found.record.findings
    assert (finding.severity, finding.node) == (Severity.WARNING, "0")
    assert "times the variance" in finding.why
    assert found.record.verdict == "pass"


def test_the_shift_told_is_that_of_theory() -> None:
    # Var(m x / k) = E[x^2] / k - E[x]^2, which for a mean of 0 is Var(x) / k.
    (finding,) = audit(BEFORE_NORM["at once"], [{"input": ROWS}]).record.findings
    told = float(finding.why.partition("input has ")[2].split()[0])
    assert told == pytest.approx(1 / 0.7, rel=0.03)


@pytest.mark.parametrize("name", NOT_BEFORE_NORM)
def test_other_dropout_is_not_warned_of(name: str) -> None:
    assert audit(NOT_BEFORE_NORM[name], [{"input": ROWS}]).record.findings == ()


@dataclass
class Answer:
    logits: Tensor


class AnswersWithAnObject(nn.Module):
    def forward(self, x: Tensor) -> Answer:
        return Answer(F.dropout(x, 0.2, self.training))


def test_an_answer_that_is_an_object_of_the_users_is_read() -> None:
    assert verdicts(audit(AnswersWithAnObject(), [X])) == {"": Kind.INVERTED}


class MakesItself(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Dropout(0.2)(x)


def test_a_module_made_in_the_forward_belongs_to_its_maker_and_is_always_on() -> None:
    assert verdicts(audit(MakesItself(), [X])) == {"": Kind.ALWAYS_ON}


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


def test_what_cannot_be_watched_is_unproven() -> None:
    found = audit(nn.Sequential(nn.Dropout(0.2), Branches()), [{"input": X["x"]}])
    assert found.record.verdict == "unproven"


class Fused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, 0.2, self.training)[0].square()


def test_the_fused_dropout_of_gpus_is_taken_apart() -> None:
    (site,) = audit(Fused(), [X]).sites
    assert (site.kind, site.train_scale) == (Kind.INVERTED, pytest.approx(1.25))


class AsksItsChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.2, self.child.training)


def test_a_site_that_asks_its_child_for_the_mode_is_judged() -> None:
    assert verdicts(audit(AsksItsChild(), [X])) == {"": Kind.INVERTED}


class AroundRandom(nn.Module):
    """A dropout of its own, around a module that is always random."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.Always()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.inner(x), 0.2, self.training)


def test_around_a_module_that_is_always_random_nothing_is_called_fine() -> None:
    assert verdicts(audit(AroundRandom(), [X])) == {"": Kind.INCONCLUSIVE, "inner": Kind.ALWAYS_ON}
