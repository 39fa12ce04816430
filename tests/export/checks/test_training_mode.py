from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evalmode.bundle.certificate import Verdict
from evalmode.export.checks import training_mode

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
MODE = helper.make_tensor_value_info("mode", TensorProto.BOOL, [])


def judged(
    node: onnx.NodeProto,
    *,
    opset: int,
    constants: dict[str, object] | None = None,
    inputs: tuple[onnx.ValueInfoProto, ...] = (),
    before: tuple[onnx.NodeProto, ...] = (),
) -> Verdict:
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()]
    graph = helper.make_graph([*before, node], "main", [X, *inputs], [Y], initializers)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return training_mode.check(helper.make_model(graph, opset_imports=opsets)).verdict


def dropout(*more: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node("Dropout", ["x", *more], ["y"], **attributes)


@pytest.mark.parametrize("opset", [1, 6])
def test_an_old_dropout_trains_unless_it_says_otherwise(opset: int) -> None:
    assert judged(dropout(), opset=opset) is Verdict.FAIL
    assert judged(dropout(is_test=1), opset=opset) is Verdict.PASS


@pytest.mark.parametrize("opset", [7, 10])
def test_a_middle_aged_dropout_never_trains(opset: int) -> None:
    assert judged(dropout(ratio=0.5), opset=opset) is Verdict.PASS


@pytest.mark.parametrize("opset", [12, 13, 20, 22])
def test_a_modern_dropout_is_judged_by_its_mode_input(opset: int) -> None:
    half, on, off = {"r": np.float32(0.5)}, {"m": np.True_}, {"m": np.False_}
    assert judged(dropout(), opset=opset) is Verdict.PASS
    assert judged(dropout("r"), opset=opset, constants=half) is Verdict.PASS
    assert judged(dropout("r", "m"), opset=opset, constants=half | off) is Verdict.PASS
    assert judged(dropout("r", "m"), opset=opset, constants=half | on) is Verdict.FAIL
    assert judged(dropout("", "m"), opset=opset, constants=on) is Verdict.FAIL
    assert judged(dropout("r", "m"), opset=opset, constants={"r": np.float32(0)} | on) is Verdict.PASS


def test_a_mode_that_is_a_constant_node_is_read() -> None:
    constant = helper.make_node("Constant", [], ["m"], value=numpy_helper.from_array(np.asarray(True)))
    assert judged(dropout("", "m"), opset=20, before=(constant,)) is Verdict.FAIL


def test_a_mode_that_the_caller_decides_is_unproven() -> None:
    assert judged(dropout("", "mode"), opset=20, inputs=(MODE,)) is Verdict.UNPROVEN


def test_a_mode_whose_default_the_caller_may_override_is_unproven() -> None:
    assert judged(dropout("", "mode"), opset=20, inputs=(MODE,), constants={"mode": False}) is Verdict.UNPROVEN


def test_a_mode_that_is_computed_is_unproven() -> None:
    computed = helper.make_node("Not", ["n"], ["m"])
    assert judged(dropout("", "m"), opset=20, before=(computed,), constants={"n": True}) is Verdict.UNPROVEN


@pytest.mark.parametrize(
    ("opset", "attributes", "outputs", "verdict"),
    [
        (6, {}, 1, Verdict.FAIL),
        (6, {"is_test": 1}, 1, Verdict.PASS),
        (9, {}, 1, Verdict.PASS),
        (9, {}, 3, Verdict.FAIL),
        (15, {}, 1, Verdict.PASS),
        (15, {"training_mode": 1}, 3, Verdict.FAIL),
    ],
)
def test_batch_normalization_is_judged_by_its_opset(
    opset: int, attributes: dict[str, int], outputs: int, verdict: Verdict
) -> None:
    names = ["y", "mean", "variance"][:outputs]
    node = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], names, **attributes)
    assert judged(node, opset=opset) is verdict


@pytest.mark.parametrize(("op", "index"), [("BitmaskDropout", 2), ("BiasDropout", 4), ("BitmaskBiasDropout", 4)])
def test_the_contributed_dropouts_are_judged_by_their_mode_input(op: str, index: int) -> None:
    inputs = ["x", *[""] * (index - 1), "m"]
    node = helper.make_node(op, inputs, ["y"], domain="com.microsoft")
    assert judged(node, opset=20, constants={"m": True}) is Verdict.FAIL
    assert judged(node, opset=20, constants={"m": False}) is Verdict.PASS


@pytest.mark.parametrize(
    ("domain", "op"),
    [
        ("com.microsoft", "DropoutGrad"),
        ("com.microsoft", "BitmaskDropoutGrad"),
        ("com.microsoft", "BiasSoftmaxDropout"),
        ("com.microsoft", "BatchNormInternal"),
        ("com.microsoft", "LSTMTraining"),
        ("com.microsoft", "GRUTraining"),
        ("ai.onnx.preview.training", "Gradient"),
        ("ai.onnx.preview.training", "Adam"),
        ("ai.onnx.preview.training", "Adagrad"),
        ("ai.onnx.preview.training", "Momentum"),
    ],
)
def test_an_operator_of_a_training_build_fails(domain: str, op: str) -> None:
    assert judged(helper.make_node(op, ["x"], ["y"], domain=domain), opset=20) is Verdict.FAIL
