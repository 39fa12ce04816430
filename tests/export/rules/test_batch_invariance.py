"""The rule batch-invariance: rows that depend on their neighbours, and rows that do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from onnxruntime.quantization import quantize_dynamic
from torch import Tensor, nn

from evalmode.bundle.certificate import Record, Verdict
from evalmode.export.certify import subject_of
from evalmode.export.inputs.samples import candidate_of
from evalmode.export.rules import batch_invariance
from tests.export.rules.quantised import classifier
from tests.export.rules.small_graphs import (
    DOUBLED,
    ROWS,
    Calls,
    graph,
    messages,
    node,
    small_subject,
)


def test_a_row_normalised_by_its_neighbours_fails_with_the_size_of_the_change() -> None:
    centred = graph(
        node("ReduceMean", "x", "axis", output="mean", keepdims=1),
        node("Sub", "x", "mean"),
        axis=np.array([0]),
    )
    subject = small_subject(centred)
    record = batch_invariance.check(subject)
    assert record.verdict is Verdict.FAIL
    assert "another row in the batch changes this row's answer by" in messages(record)
    assert subject.row_counts == {4: (1,)}


def test_a_row_that_changes_only_in_large_batches_fails_too() -> None:
    """In a batch of fewer than eight rows the slice of the eighth row is empty, with the sum 0."""
    crowded = graph(
        node("Slice", "x", "from", "to", "axis", output="eighth"),
        node("ReduceSum", "eighth", "axis", output="sum", keepdims=1),
        node("Add", "x", "sum"),
        **{"from": np.array([7]), "to": np.array([8]), "axis": np.array([0])},
    )
    subject = small_subject(crowded)
    assert batch_invariance.check(subject).verdict is Verdict.FAIL


def test_independent_rows_pass_at_every_batch_size() -> None:
    subject = small_subject(DOUBLED)
    assert batch_invariance.check(subject).verdict is Verdict.PASS
    assert subject.row_counts == {4: tuple(range(1, 65))}


def test_dynamic_int8_lets_a_row_change_with_its_neighbours(tmp_path: Path) -> None:
    subject = classifier(quantize_dynamic, tmp_path)
    record = batch_invariance.check(subject)
    assert record.verdict is Verdict.FAIL
    assert "another row in the batch changes this row's answer by " in messages(record)


def test_a_batch_norm_without_statistics_lets_a_row_change_with_its_neighbours() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    subject = subject_of(candidate_of(module, [torch.from_numpy(ROWS)]))
    record = batch_invariance.check(subject)
    assert record.verdict is Verdict.FAIL
    assert "another row in the batch changes this row's answer by " in messages(record)


class Normalised(nn.Module):
    """BatchNorm by batch statistics; `answer_of(module, normalised)` is the answer."""

    def __init__(self, answer_of: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.linear, self.answer_of = nn.Linear(4, 4), answer_of
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> object:
        y = self.norm(self.linear(x))
        return self.answer_of(self, y if scale is None else y * scale)


def record_of(module: nn.Module, *samples: object, dynamic_axes: Sequence[str] = ()) -> Record:
    candidate = candidate_of(module.eval(), samples, dynamic_axes=dynamic_axes)
    return batch_invariance.check(subject_of(candidate))


@pytest.mark.parametrize(
    "answer_of",
    [
        pytest.param(lambda m, y: {"y": y, "penalty": m.linear.weight.square().sum()}, id="number"),
        pytest.param(lambda m, y: {"y": y, "loss": y.square().mean()}, id="loss"),
        pytest.param(lambda m, y: {"loss": y.square().mean(), "y": y}, id="loss first"),
        pytest.param(lambda m, y: {"y": y, "weight": m.linear.weight + 0.0}, id="weight"),
        pytest.param(lambda m, y: y.unsqueeze(0), id="an axis in front"),
        pytest.param(lambda m, y: y.T, id="rows are the second axis"),
        pytest.param(lambda m, y: y.reshape(-1), id="rows in one line"),
        pytest.param(lambda m, y: y.T.reshape(-1), id="rows in one line, one by one"),
    ],
)
def test_batch_statistics_are_found_in_any_structure_of_answers(
    answer_of: Callable[[nn.Module, Tensor], object],
) -> None:
    record = record_of(Normalised(answer_of), torch.randn(4, 4), torch.randn(7, 4))
    assert record.verdict is Verdict.FAIL
    assert "another row in the batch changes this row's answer by" in messages(record)


@pytest.mark.parametrize("scale", [torch.tensor(2.0), torch.tensor([1.5]), torch.rand(1, 4)])
def test_batch_statistics_are_found_beside_an_input_that_all_rows_share(scale: Tensor) -> None:
    samples = [{"x": torch.randn(rows, 4), "scale": scale} for rows in (4, 7)]
    module = Normalised(lambda _, y: y)
    assert record_of(module, *samples).verdict is Verdict.FAIL
    assert record_of(module, samples[0]).verdict is Verdict.FAIL


class RowsSecond(nn.Module):
    """x of (length, rows, width); `norm` gets it as (rows, width, length)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(1, 2, 0)).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("norm", "verdict"),
    [
        (nn.BatchNorm1d(4, track_running_stats=False), Verdict.FAIL),
        (nn.BatchNorm1d(4), Verdict.PASS),
        (nn.InstanceNorm1d(4), Verdict.PASS),
    ],
)
def test_rows_on_the_second_axis_are_compared(norm: nn.Module, verdict: Verdict) -> None:
    samples = [torch.randn(5, 3, 4), torch.randn(7, 2, 4)]
    record = record_of(RowsSecond(norm), *samples, dynamic_axes=["x=length,batch,_"])
    assert record.verdict is verdict, messages(record)


@pytest.mark.parametrize(
    "answer_of",
    [
        pytest.param(lambda x, y: {"y": y, "norm": torch.ones(()) * 3}, id="a constant"),
        pytest.param(lambda x, y: {"y": y, "tokens": y.reshape(-1, 2)}, id="tokens of all rows"),
        pytest.param(lambda x, y: {"y": y, "columns": y.T}, id="rows on the last axis"),
        pytest.param(lambda x, y: {"y": y, "line": y.T.reshape(-1)}, id="columns in one line"),
    ],
)
def test_independent_rows_pass_on_any_axis_of_an_answer(
    answer_of: Callable[[Tensor, Tensor], object],
) -> None:
    module = Calls(lambda x: answer_of(x, x.tanh()))  # type: ignore[arg-type, return-value]
    record = record_of(module, torch.randn(4, 4), torch.randn(7, 4))
    assert record.verdict is Verdict.PASS, messages(record)


def test_an_answer_that_mixes_rows_and_has_no_axis_of_them_is_unproven_and_named() -> None:
    module = Calls(lambda x: {"y": x.tanh(), "loss": x.square().mean()})  # type: ignore[arg-type, return-value]
    record = record_of(module, torch.randn(4, 4), torch.randn(7, 4))
    assert record.verdict is Verdict.UNPROVEN
    (finding,) = record.findings
    assert finding.node == "loss"
    assert "has no axis of rows but changes with the rows" in finding.why


def test_inputs_without_rows_are_not_applicable() -> None:
    record = record_of(
        RowsSecond(nn.InstanceNorm1d(4)), torch.randn(5, 1, 4), dynamic_axes=["x=length,_,_"]
    )
    assert record.verdict is Verdict.NOT_APPLICABLE
