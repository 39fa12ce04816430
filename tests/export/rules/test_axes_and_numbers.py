"""The rules dynamic-axes and non-finite, and the limits of parity for graphs of lower precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    quantize_dynamic,
    quantize_static,
)
from torch import Tensor, nn

from evalmode.bundle.certificate import Verdict
from evalmode.export.certify import subject_of
from evalmode.export.inputs.samples import candidate_of
from evalmode.export.rules import batch_invariance, dynamic_axes, non_finite, parity
from evalmode.export.rules.subject import Subject
from tests.export.rules.small_graphs import ROWS, Calls, graph, node, said, subject


def test_an_axis_that_varies_passes() -> None:
    assert (
        dynamic_axes.check(subject(graph(node("Add", "x", "x")), lambda x: x + x)).verdict
        is Verdict.PASS
    )


def test_an_axis_that_the_exporter_fixed_is_named_with_its_size() -> None:
    record = dynamic_axes.check(
        subject(graph(node("Add", "x", "x"), rows=8), lambda x: x + x, probes=[{"x": ROWS}])
    )
    assert record.verdict is Verdict.FAIL
    assert said(record) == "x: axis 0 (batch) is 8 in the graph"


def test_a_size_that_the_module_reads_and_the_graph_does_not_is_named() -> None:
    eight = graph(node("Reshape", "x", "shape"), shape=np.array([8, 4]))
    record = dynamic_axes.check(subject(eight, lambda x: x))
    assert record.verdict is Verdict.FAIL
    assert "the module reads x [1, 4], the graph does not: " in said(record)


def test_a_shape_that_is_not_the_modules_is_named() -> None:
    flat = graph(node("Reshape", "x", "shape"), shape=np.array([-1, 2]))
    record = dynamic_axes.check(subject(flat, lambda x: x))
    assert "y: its shape is [16, 2] for x [8, 4], the module's is [8, 4]" in said(record)


class Branches(nn.Module):
    """Twice its input, up to 100 rows; beyond them something else, or nothing at all."""

    def __init__(self, *, ends: bool) -> None:
        super().__init__()
        self.ends = ends

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] <= 100:
            return x * 2
        if self.ends:
            raise ValueError("at most 100 rows")
        return x * 3


def test_a_branch_for_sizes_beyond_every_probe_is_told_by_the_bound_of_the_trace() -> None:
    record = dynamic_axes.check(
        subject_of(candidate_of(Branches(ends=False).eval(), [torch.from_numpy(ROWS)]))
    )
    assert record.verdict is Verdict.FAIL
    assert "the graph is the module's for batch up to 100, and the module also reads 101" in said(
        record
    )


def test_a_module_that_ends_where_its_graph_does_passes_and_tells_the_bound() -> None:
    record = dynamic_axes.check(
        subject_of(candidate_of(Branches(ends=True).eval(), [torch.from_numpy(ROWS)]))
    )
    assert record.verdict is Verdict.PASS
    assert record.measured.endswith("batch at most 100")


def test_without_declared_axes_the_rule_does_not_apply() -> None:
    model = graph(node("Add", "x", "x"))
    made = Subject(module=Calls(lambda x: x + x), model=model, probes=[{"x": ROWS}], rows={})
    assert dynamic_axes.check(made).verdict is Verdict.NOT_APPLICABLE


@pytest.mark.parametrize(
    ("model", "answer", "why"),
    [
        (graph(node("Log", "x")), lambda x: x, "the answer holds a NaN"),
        (graph(node("Log", "x")), torch.log, "the answer holds a NaN, the module's own does too"),
        (
            graph(node("Div", "x", "zero"), zero=np.float32(0)),
            lambda x: x,
            "the answer holds an infinity",
        ),
        (graph(node("Add", "x", "w"), w=np.array([np.nan] * 4, np.float32)), lambda x: x, "w"),
    ],
)
def test_what_is_not_a_number_is_named(
    model: onnx.ModelProto, answer: Callable[[Tensor], Tensor], why: str
) -> None:
    record = non_finite.check(subject(model, answer))
    assert record.verdict is Verdict.FAIL
    assert why in said(record)


def test_an_infinity_that_the_module_answers_with_too_is_an_answer() -> None:
    made = subject(graph(node("Div", "x", "zero"), zero=np.float32(0)), lambda x: x / 0)
    assert non_finite.check(made).verdict is Verdict.PASS


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Reader(CalibrationDataReader):
    def __init__(self, rows: np.ndarray) -> None:
        self.rows = iter([{"x": rows}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rows, None)


def classifier(change: Callable[[Path, Path], object] | None, folder: Path) -> Subject:
    """A classifier whose graph was changed after the export, as quantisers do."""
    x = (
        torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-1, 1, 32)[:, None]
    )
    made = subject_of(candidate_of(Classifier().eval(), [x]))
    if change is None:
        return made
    # the quantiser infers shapes anew, and transposes weights first
    del made.model.graph.value_info[:]
    onnx.save(made.model, folder / "before.onnx")
    change(folder / "before.onnx", folder / "after.onnx")
    return Subject(
        module=made.module,
        model=onnx.load(folder / "after.onnx"),
        probes=made.probes,
        rows=made.rows,
        dynamic_axes=made.dynamic_axes,
        labelled=True,
    )


def quantised(before: Path, after: Path) -> None:
    rows = torch.randn(256, 16, generator=torch.Generator().manual_seed(1)).numpy() * 3
    quantize_static(before, after, Reader(rows.astype(np.float32)), quant_format=QuantFormat.QDQ)


def test_dynamic_int8_lets_a_row_change_with_its_neighbours(tmp_path: Path) -> None:
    made = classifier(quantize_dynamic, tmp_path)
    record = batch_invariance.check(made)
    assert record.verdict is Verdict.FAIL
    assert "another row in the batch changes this row's answer by " in said(record)


def test_static_int8_does_not_and_is_held_to_the_limits_of_int8(tmp_path: Path) -> None:
    made = classifier(quantised, tmp_path)
    assert batch_invariance.check(made).verdict is Verdict.PASS
    assert parity.limits_of(made.model) is parity.INT8
    record = parity.check(made)
    assert record.limit.startswith("int8: ")


def test_a_batch_norm_without_statistics_lets_a_row_change_with_its_neighbours() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    made = subject_of(candidate_of(module, [torch.from_numpy(ROWS)]))
    record = batch_invariance.check(made)
    assert record.verdict is Verdict.FAIL
    assert "another row in the batch changes this row's answer by " in said(record)


def test_half_precision_is_held_to_its_own_limits(tmp_path: Path) -> None:
    made = subject_of(candidate_of(Classifier().half().eval(), [torch.randn(32, 16).half()]))
    assert parity.limits_of(made.model) is parity.FP16
    assert parity.check(made).verdict is Verdict.PASS


@pytest.mark.parametrize("shift", [0.1, float("nan")])
def test_half_precision_is_no_excuse_for_another_function(shift: float) -> None:
    made = subject_of(candidate_of(Classifier().half().eval(), [torch.randn(32, 16).half()]))
    other = Classifier().half().eval()
    with torch.no_grad():
        other.body[4].bias[0] += shift
    moved = Subject(
        module=other, model=made.model, probes=made.probes, rows=made.rows, labelled=True
    )
    assert parity.check(moved).verdict is Verdict.FAIL
