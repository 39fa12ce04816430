"""The rules that run a bare file, on samples or on inputs generated from its signature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evalmode.bundle.certificate import Record, Verdict
from evalmode.export.rules.registry import RULES, Needs
from evalmode.export.verify.options import Options
from evalmode.export.verify.verify import verify

ROWS = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)


def save(
    folder: Path,
    *nodes: onnx.NodeProto,
    kind: int = TensorProto.FLOAT,
    shape: object = ("n", 4),
    **constants: object,
) -> Path:
    input_ = helper.make_tensor_value_info("x", kind, list(shape))  # type: ignore[call-overload]
    output_info = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    weights = [
        numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()
    ]
    graph = helper.make_graph(nodes, "g", [input_], [output_info], weights)
    path = folder / "any.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path
    )
    return path


def node(op: str, *inputs: str, output: str = "y", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), [output], **attributes)


def run_records(path: Path, *samples: dict[str, object]) -> dict[str, Record]:
    names = [rule.name for rule in RULES if rule.needs is Needs.RUN]
    records = verify(path, Options(samples=samples)).records
    return {record.rule: record for record in records if record.rule in names}


def test_a_deterministic_file_passes_on_generated_inputs(tmp_path: Path) -> None:
    records = run_records(save(tmp_path, node("Relu", "x")))
    assert list(records) == ["non-finite", "repeatability", "batch-invariance"]
    assert {record.verdict for record in records.values()} == {Verdict.PASS}


def test_noise_is_found_by_repeated_runs(tmp_path: Path) -> None:
    noisy = save(tmp_path, node("RandomUniformLike", "x", output="n"), node("Add", "x", "n"))
    assert run_records(noisy)["repeatability"].verdict is Verdict.FAIL


@pytest.mark.parametrize("with_samples", [True, False])
def test_dynamic_quantisation_is_found_by_changing_the_other_rows(
    with_samples: bool, tmp_path: Path
) -> None:
    quantised = save(
        tmp_path,
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        node("DequantizeLinear", "q", "scale", "zero"),
    )
    record = run_records(quantised, *([{"x": ROWS}] if with_samples else []))["batch-invariance"]
    assert record.verdict is Verdict.FAIL
    assert "another row in the batch changes this row's answer by " in str(record.findings[0])


def test_batch_invariance_does_not_apply_to_a_file_without_a_batch_axis(tmp_path: Path) -> None:
    records = run_records(save(tmp_path, node("Relu", "x"), shape=(2, 4)))
    assert records["batch-invariance"].verdict is Verdict.NOT_APPLICABLE
    assert records["repeatability"].verdict is Verdict.PASS


def test_a_file_that_answers_with_nan_fails(tmp_path: Path) -> None:
    assert (
        run_records(save(tmp_path, node("Log", "x")), {"x": -np.abs(ROWS)})["non-finite"].verdict
        is Verdict.FAIL
    )


@pytest.mark.parametrize(
    ("samples", "why"),
    [
        ([{"y": ROWS}], "the inputs are x, got y"),
        ([{"x": ROWS[:, :2]}], "ONNX Runtime cannot run the model on these inputs"),
        ([{"x": ROWS.astype(np.float64)}], "ONNX Runtime cannot run the model on these inputs"),
    ],
)
def test_unsuitable_inputs_leave_the_rules_unproven(
    samples: list[dict[str, object]], why: str, tmp_path: Path
) -> None:
    records = run_records(save(tmp_path, node("Relu", "x")), *samples)
    assert {record.verdict for record in records.values()} == {Verdict.UNPROVEN}
    assert all(why in str(record.findings[0]) for record in records.values())


def test_a_file_with_a_text_input_is_unproven_without_samples(tmp_path: Path) -> None:
    texts = save(tmp_path, node("StringNormalizer", "x"), kind=TensorProto.STRING, shape=("n",))
    assert {record.verdict for record in run_records(texts).values()} == {Verdict.UNPROVEN}


def test_a_file_that_the_runtime_cannot_open_is_unproven(tmp_path: Path) -> None:
    strange = save(tmp_path, helper.make_node("NoSuchOperator", ["x"], ["y"], domain="nobody"))
    assert {record.verdict for record in run_records(strange).values()} == {Verdict.UNPROVEN}


def test_external_weights_are_read(tmp_path: Path) -> None:
    path = save(tmp_path, node("Add", "x", "w"), w=np.ones((1, 4), np.float32))
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert {record.verdict for record in run_records(path).values()} == {Verdict.PASS}


@pytest.mark.parametrize(
    ("kind", "shape", "reason"),
    [
        (TensorProto.BFLOAT16, (2,), "input x is not a tensor of numbers that NumPy has"),
        (999, (2,), "input x is not a tensor of numbers that NumPy has"),
        (TensorProto.FLOAT, (1 << 40,), "which is too large to generate"),
    ],
    ids=["bfloat16", "an unknown type", "huge"],
)
def test_a_type_or_shape_for_which_no_input_can_be_generated_is_named(
    kind: int, shape: tuple[int, ...], reason: str, tmp_path: Path
) -> None:
    records = run_records(save(tmp_path, node("Identity", "x"), kind=kind, shape=shape))
    assert {record.verdict for record in records.values()} == {Verdict.UNPROVEN}
    assert all(reason in record.findings[0].why for record in records.values())


def test_a_negative_size_is_a_size_that_varies(tmp_path: Path) -> None:
    path = save(tmp_path, node("Relu", "x"), shape=(-1, 4))
    assert {record.verdict for record in run_records(path).values()} == {Verdict.PASS}
