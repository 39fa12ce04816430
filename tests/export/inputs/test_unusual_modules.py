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
from evalmode.export.inputs.samples import bind_samples, candidate_of
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
    sample = X.clone()
    assert verdict_of(ScalesItsInput(), sample) is Verdict.PASS
    assert torch.equal(sample, X), "the user's sample is unchanged"


class SameAnswerObject(nn.Module):
    """Answers with one tensor, which the next forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = torch.zeros(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        self.answer.add_(x)
        return self.answer


def test_answers_are_copied_before_they_are_compared() -> None:
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
def test_a_module_with_parameters_is_not_only_a_dropout_whatever_its_name(
    make: type[nn.Module],
) -> None:
    assert not is_dropout(make())
    assert verdict_of(nn.Sequential(make(), nn.Linear(6, 2))) is Verdict.PASS
    samples, _ = bind_samples(nn.Sequential(make()), [X])
    assert audit(nn.Sequential(make()), samples).record.verdict is not Verdict.FAIL


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_child_is_refused_by_its_path() -> None:
    module = nn.Sequential(nn.Linear(6, 2), torch.jit.script(nn.Dropout(0.4)))
    with pytest.raises(UnusableInputs, match=r"^1 is a scripted or traced module"):
        candidate_of(module.eval(), [X])


class TrainReturnsNothing(DropoutWithAHead):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def test_a_train_that_returns_nothing_is_supported() -> None:
    module = TrainReturnsNothing()
    module.eval()
    candidate = candidate_of(module, [X])
    records = certify(candidate, progress=lambda step: None).records
    assert overall(records) is Verdict.PASS
    assert audit(TrainReturnsNothing(), [{"x": X}]).record.verdict is Verdict.PASS


def test_a_module_that_cannot_be_put_into_eval_mode_is_refused_in_one_sentence(
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
    """Answers with its input and state of the last calls; nothing is random."""

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
def test_state_that_changes_is_named_and_not_called_random(rate: float) -> None:
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
    assert "changes from one to the next" in finding.why
    assert "make it an input and an output" in finding.fix


class Counts(nn.Module):
    """Counts its calls, which no answer depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2


def test_a_counter_that_no_answer_depends_on_passes() -> None:
    assert verdict_of(Counts()) is Verdict.PASS


class Picks(nn.Module):
    """The positions of the highest scores: runtimes choose differently among equal ones."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.score = how, nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.score(x).squeeze(-1)
        if self.how == "topk":
            return scores.topk(2, -1).indices
        return scores.argsort(-1) if self.how == "argsort" else scores.argmax(-1)


class PicksWords(Picks):
    """The same by the ids of words."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.table = nn.Embedding(200, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(self.table(ids))


@pytest.mark.parametrize("how", ["topk", "argmax", "argsort"])
def test_probes_have_no_equal_scores(how: str) -> None:
    assert verdict_of(Picks(how), torch.randn(2, 5, 6), torch.randn(3, 7, 6)) is Verdict.PASS
    generator = torch.Generator().manual_seed(0)
    words = [torch.randperm(200, generator=generator)[: 3 * n].reshape(3, n) for n in (6, 9)]
    assert verdict_of(PicksWords(how), *words) is Verdict.PASS


class Positions(nn.Module):
    """Words and their positions, for square samples."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(20, 8), nn.Embedding(64, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head((self.words(ids) + self.positions(torch.arange(ids.shape[1]))).mean(1))


def test_square_samples_have_rows_and_positions() -> None:
    samples = [torch.randint(20, (size, size)) for size in (4, 6)]
    candidate = candidate_of(Positions().eval(), samples)
    assert candidate.evidence.dynamic_axes == {"ids": {0: "batch", 1: "length"}}
    rows, length = candidate.example["ids"].shape
    assert rows != length, "an exporter may take axes of one size for one axis"
    assert verdict_of(Positions(), *samples) is Verdict.PASS


class Images(nn.Module):
    """A convolution and a mean over its output, for square images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.conv(image).relu().mean((2, 3)))


def test_square_images_are_certified_for_images_of_any_sides() -> None:
    samples = [torch.randn(2, 3, 8, 8), torch.randn(3, 3, 12, 12)]
    candidate = candidate_of(Images().eval(), samples)
    assert candidate.evidence.dynamic_axes == {"image": {0: "batch", 2: "length", 3: "length1"}}
    assert verdict_of(Images(), *samples) is Verdict.PASS


def test_the_fourier_transform_has_a_tolerance_of_its_own() -> None:
    class Mixes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft2(x).real

    assert verdict_of(Mixes(), torch.randn(2, 14, 8), torch.randn(3, 9, 8)) is Verdict.PASS
