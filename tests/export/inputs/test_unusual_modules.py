"""Modules that run or change modes in an unusual way: certified, or refused in one sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from evalmode.bundle.certificate import Verdict, overall
from evalmode.errors import EvalmodeError
from evalmode.export.audit.audit import audit
from evalmode.export.certify import certify
from evalmode.export.inputs.errors import UnusableInputs
from evalmode.export.inputs.references import UserCodeFailed, load_in_eval_mode
from evalmode.export.inputs.samples import bound, candidate_of
from evalmode.export.module.dropouts import is_dropout

X = torch.arange(24.0).reshape(4, 6) / 10


def verdict_of(module: nn.Module, *samples: Tensor) -> Verdict:
    candidate = candidate_of(module.eval(), list(samples) or [X])
    return overall(certify(candidate, progress=lambda step: None).records)


class ScalesItsInput(nn.Module):
    """Preprocessing that writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mul_(2))


def test_a_forward_that_writes_to_its_input_gets_copies_and_is_certified() -> None:
    mine = X.clone()
    assert verdict_of(ScalesItsInput(), mine) is Verdict.PASS
    assert torch.equal(mine, X), "the user's own sample is as it was"


class SameAnswerObject(nn.Module):
    """Answers with one tensor, which the next forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = torch.zeros(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        self.answer.add_(x)
        return self.answer


def test_repeats_are_compared_by_value_and_not_with_their_own_memory() -> None:
    assert verdict_of(SameAnswerObject()) is not Verdict.PASS


class DropoutWithAHead(nn.Module):
    """A dropout by its name, with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(6, 6), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(x))


class GatedDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.drop = nn.Parameter(torch.zeros(1)), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.drop(x)


@pytest.mark.parametrize("make", [DropoutWithAHead, GatedDropout])
def test_a_module_with_parameters_is_no_pure_dropout_whatever_its_name(
    make: type[nn.Module],
) -> None:
    assert not is_dropout(make())
    assert verdict_of(nn.Sequential(make(), nn.Linear(6, 2))) is Verdict.PASS
    samples, _ = bound(nn.Sequential(make()), [X])
    assert audit(nn.Sequential(make()), samples).record.verdict is not Verdict.FAIL


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_child_is_refused_by_its_path() -> None:
    module = nn.Sequential(nn.Linear(6, 2), torch.jit.script(nn.Dropout(0.4)))
    with pytest.raises(UnusableInputs, match=r"^1 is a scripted or traced module"):
        candidate_of(module.eval(), [X])


class TrainReturnsNothing(DropoutWithAHead):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def test_a_train_that_does_not_return_the_module_is_no_obstacle() -> None:
    module = TrainReturnsNothing()
    module.eval()
    candidate = candidate_of(module, [X])
    records = certify(candidate, progress=lambda step: None).records
    assert overall(records) is Verdict.PASS
    assert audit(TrainReturnsNothing(), [{"x": X}]).record.verdict is Verdict.PASS


def test_a_module_that_cannot_be_put_into_eval_mode_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_graph.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def build():\n"
        "    net = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.2)).eval()\n"
        "    return torch.export.export(net, (torch.randn(4, 6),)).module()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(UserCodeFailed, match="cannot be put into eval mode") as raised:
        load_in_eval_mode("users_graph:build")
    assert isinstance(raised.value, EvalmodeError)


class RemembersTheLast(nn.Module):
    """Answers with a frame of the call before; nothing is random."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.calls = rate, 0
        self.register_buffer("past", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        answer = x + self.past
        self.calls += 1
        self.past.mul_(1 - self.rate).add_(self.rate * x[0])
        return answer


@pytest.mark.parametrize("rate", [1.0, 0.1], ids=["the last", "a moving mean"])
def test_state_that_moves_is_named_and_not_called_randomness(rate: float) -> None:
    module = nn.Sequential(RemembersTheLast(rate)).eval()
    candidate = candidate_of(module, [X, torch.rand(3, 6)])
    (record,) = [
        record
        for record in certify(candidate, progress=lambda step: None).records
        if record.rule == "eager-randomness"
    ]
    assert record.verdict is Verdict.FAIL
    (finding,) = record.findings
    assert "0.past" in finding.why
    assert "moves from one to the next" in finding.why
    assert "make it an input and an output" in finding.fix


class Counts(nn.Module):
    """Counts its calls, which no answer depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2


def test_a_counter_that_no_answer_depends_on_is_nobodys_business() -> None:
    assert verdict_of(Counts()) is Verdict.PASS
