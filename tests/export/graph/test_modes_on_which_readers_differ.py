"""Modes that runtimes, the ONNX standard and evalmode could read differently.

None of these graphs may pass the rule, and the service may open no bundle with such a graph.

Each graph is one Dropout whose mode is written in an unusual way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evalmode.bundle.certificate import Record, Verdict
from evalmode.bundle.errors import BundleNotCertified
from evalmode.bundle.operators import check_operators
from evalmode.export.graph import graph_of
from evalmode.export.rules import training_mode
from evalmode.export.rules.subject import Subject

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [8])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [8])
DROP = helper.make_node("Dropout", ["x", "ratio", "m"], ["y"], name="drop")
RATIO = numpy_helper.from_array(np.float32(0.5), "ratio")
MODE = helper.make_tensor_value_info("m", TensorProto.BOOL, [])


def node(op: str, *inputs: str, output: str = "m", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], **attributes)


def constant(value: object, output: str = "m") -> onnx.NodeProto:
    return node("Constant", output=output, value=numpy_helper.from_array(np.asarray(value)))


def record_of(
    *nodes: onnx.NodeProto,
    initializers: Sequence[onnx.TensorProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
    opsets: Sequence[tuple[str, int]] = (("", 17), ("my", 1)),
) -> Record:
    graph = helper.make_graph([*nodes, DROP], "main", [X], [Y], [RATIO, *initializers])
    model = helper.make_model(
        graph,
        functions=functions,
        opset_imports=[helper.make_opsetid(*item) for item in opsets],
        ir_version=10,
    )
    record = training_mode.check(Subject(graph=graph_of(model)))
    if record.verdict is not Verdict.PASS:
        with pytest.raises(BundleNotCertified):
            check_operators(model.SerializeToString())
    return record


def function(
    name: str, *nodes: onnx.NodeProto, domain: str = "my", attributes: Sequence[str] = ()
) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    return helper.make_function(domain, name, ["i"], ["o"], nodes, opsets, attributes)


def branch(*nodes: onnx.NodeProto, output: str) -> onnx.GraphProto:
    value = helper.make_tensor_value_info(output, TensorProto.BOOL, [])
    return helper.make_graph(nodes, "branch", [], [value])


def chain(value: np.ndarray, *steps: tuple[str, dict[str, object]]) -> list[onnx.NodeProto]:
    """A constant, the operators in sequence, and a cast to a boolean as the mode."""
    nodes = [constant(value, "v0")]
    for index, (op, attributes) in enumerate(steps):
        nodes.append(node(op, f"v{index}", output=f"v{index + 1}", **attributes))
    return [*nodes, node("Cast", f"v{len(steps)}", to=TensorProto.BOOL)]


@pytest.mark.parametrize(
    ("value", "op"),
    [
        (np.array([1e8] * 16 + [1] + [-1e8] * 16, np.float32), "ReduceSum"),
        (np.array([1e-30] * 4 + [1e30] * 4, np.float32), "ReduceProd"),
        (np.array([2048, 1, -2048], np.float16), "ReduceSum"),
        (np.array([0.0], np.float32), "ReduceMax"),
    ],
    ids=["sum", "product", "half precision", "even the largest number"],
)
def test_floating_point_arithmetic_decides_nothing(value: np.ndarray, op: str) -> None:
    assert record_of(*chain(value, (op, {"keepdims": 0}))).verdict is Verdict.UNPROVEN


def test_an_integer_sum_saturates_as_in_the_runtime() -> None:
    """NumPy wraps around to 0, ONNX Runtime saturates at 2**31 - 1."""
    value = np.array([2**31 - 1, 2**31 - 1, 2], np.int32)
    assert record_of(*chain(value, ("ReduceSum", {"keepdims": 0}))).verdict is Verdict.FAIL


def test_a_slice_with_a_negative_step_follows_the_runtime() -> None:
    """ONNX Runtime clamps the start into the axis and returns one element; NumPy returns none."""
    ends = {"from": -5, "to": -6, "axis": 0, "step": -1}
    constants = [constant(np.array([value], np.int64), name) for name, value in ends.items()]
    sliced = node("Slice", "v", "from", "to", "axis", "step", output="s")
    nodes = [constant(np.array([True, True, True]), "v"), *constants, sliced]
    nodes += [node("Shape", "s", output="n"), node("Cast", "n", output="b", to=TensorProto.BOOL)]
    nodes += [constant(np.array([0], np.int64), "zero"), node("Squeeze", "b", "zero")]
    assert record_of(*nodes).verdict is not Verdict.PASS


def test_a_reduction_of_an_empty_tensor_follows_the_runtime() -> None:
    """ONNX Runtime keeps three axes, the standard says two: with three axes the mode is on."""
    reduced = [
        constant(np.zeros((1, 1, 0), np.int64), "v"),
        node("ReduceMax", "v", output="r", axes=[-2], keepdims=0),
        node("Shape", "r", output="s"),
        node("Size", "s", output="n"),
        constant(np.int64(3), "three"),
        node("Equal", "n", "three"),
    ]
    assert record_of(*reduced).verdict is not Verdict.PASS


@pytest.mark.parametrize("number", [2, 256, -1])
def test_a_boolean_that_is_neither_0_nor_1_decides_nothing(number: int) -> None:
    tensor = onnx.TensorProto(name="m", data_type=TensorProto.BOOL, int32_data=[number])
    assert record_of(initializers=[tensor]).verdict is Verdict.UNPROVEN
    raw = onnx.TensorProto(name="m", data_type=TensorProto.BOOL, raw_data=bytes([number % 254]))
    assert record_of(initializers=[raw]).verdict is Verdict.UNPROVEN


@pytest.mark.parametrize("shape", [(0,), (2,)])
def test_a_mode_that_is_not_one_boolean_decides_nothing(shape: tuple[int, ...]) -> None:
    tensor = numpy_helper.from_array(np.zeros(shape, np.bool_), "m")
    assert record_of(initializers=[tensor]).verdict is Verdict.UNPROVEN


def test_a_mode_of_another_type_decides_nothing() -> None:
    tensor = numpy_helper.from_array(np.int64(0), "m")
    assert record_of(initializers=[tensor]).verdict is Verdict.UNPROVEN


@pytest.mark.parametrize("opsets", [[("my", 1)], [("", 6), ("", 17)], [("", 17), ("ai.onnx", 6)]])
def test_an_absent_or_contradictory_opset_decides_nothing(opsets: list[tuple[str, int]]) -> None:
    record = record_of(constant(False), opsets=opsets)
    assert record.verdict is Verdict.UNPROVEN
    assert "its opset is not known" in str(record.findings[0])


def test_an_opset_that_is_imported_twice_with_one_version_is_accepted() -> None:
    assert record_of(constant(False), opsets=[("", 17), ("ai.onnx", 17)]).verdict is Verdict.PASS


def test_a_function_named_constant_decides_nothing_because_the_runtime_ignores_its_domain() -> None:
    always_off = function("Constant", constant(False, "o"))
    on = helper.make_node("Constant", ["x"], ["m"], domain="my")
    on.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.asarray(True))))
    assert record_of(on, functions=[always_off]).verdict is Verdict.UNPROVEN


@pytest.mark.parametrize("name", ["Not", "Identity"])
@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_a_function_named_like_an_operator_of_the_runtime_decides_nothing(
    name: str, domain: str
) -> None:
    off = function(name, constant(False, "o"), domain=domain)
    call = helper.make_node(name, ["no"], ["m"], domain=domain)
    assert record_of(constant(False, "no"), call, functions=[off]).verdict is Verdict.UNPROVEN


def test_a_call_of_an_overload_decides_nothing() -> None:
    on, off = function("f", constant(True, "o")), function("f", constant(False, "o"))
    off.overload = "off"
    call = helper.make_node("f", ["x"], ["m"], domain="my")
    assert record_of(call, functions=[on, off]).verdict is Verdict.FAIL
    call.overload = "off"
    assert record_of(call, functions=[on, off]).verdict is Verdict.UNPROVEN


def test_an_attribute_with_two_values_decides_nothing() -> None:
    odd = node("Constant", output="n", value_int=1)
    odd.attribute[0].t.CopyFrom(numpy_helper.from_array(np.int64(0)))
    assert record_of(odd, node("Cast", "n", to=TensorProto.BOOL)).verdict is Verdict.UNPROVEN


def test_an_attribute_of_the_wrong_type_decides_nothing() -> None:
    odd = node("Constant", output="n")
    odd.attribute.add(name="value_int", type=onnx.AttributeProto.FLOAT, f=0.0)
    assert record_of(odd, node("Cast", "n", to=TensorProto.BOOL)).verdict is Verdict.UNPROVEN


def test_an_attribute_reference_with_a_value_decides_nothing() -> None:
    both = node("Constant", output="o")
    both.attribute.add(
        name="value",
        ref_attr_name="k",
        type=onnx.AttributeProto.TENSOR,
        t=numpy_helper.from_array(np.asarray(False)),
    )
    call = helper.make_node("f", ["x"], ["m"], domain="my")
    call.attribute.append(helper.make_attribute("k", numpy_helper.from_array(np.asarray(True))))
    assert record_of(call, functions=[function("f", both, attributes=["k"])]).verdict is (
        Verdict.UNPROVEN
    )


def test_a_branch_that_refers_to_an_attribute_of_the_call_decides_nothing() -> None:
    chosen = node("If", "yes", output="o", else_branch=branch(constant(False, "e"), output="e"))
    chosen.attribute.add(
        name="then_branch",
        ref_attr_name="g",
        type=onnx.AttributeProto.GRAPH,
        g=branch(constant(False, "t"), output="t"),
    )
    body = function("f", constant(True, "yes"), chosen, attributes=["g"])
    call = helper.make_node("f", ["x"], ["m"], domain="my")
    graph_attribute = helper.make_attribute("g", branch(constant(True, "g"), output="g"))
    call.attribute.append(graph_attribute)
    assert record_of(call, functions=[body]).verdict is Verdict.UNPROVEN


def test_names_in_a_graph_attribute_decide_nothing_in_the_function_that_uses_it() -> None:
    """The Dropout reads `m`: False where the graph is written, True where the function runs it."""
    drop = helper.make_node("Dropout", ["x", "ratio", "m"], ["t"], name="inner")
    value = helper.make_tensor_value_info("t", TensorProto.FLOAT, [8])
    graph_attribute = helper.make_graph([drop], "graph", [], [value])
    chosen = node("If", "yes", output="o")
    for name in ("then_branch", "else_branch"):
        chosen.attribute.add(name=name, ref_attr_name="g", type=onnx.AttributeProto.GRAPH)
    body = function("f", constant(True, "m"), constant(True, "yes"), chosen, attributes=["g"])
    call = helper.make_node("f", ["x"], ["unused"], domain="my", g=graph_attribute)
    record = record_of(constant(False), call, functions=[body])
    assert record.verdict is Verdict.UNPROVEN
    assert any("inner" in finding.node for finding in record.findings)


def test_a_name_that_hides_an_outer_name_decides_nothing() -> None:
    bodies = {
        key: branch(constant(False, "hidden"), output="hidden")
        for key in ("then_branch", "else_branch")
    }
    nodes = [constant(True, "hidden"), constant(True, "yes"), node("If", "yes", **bodies)]
    assert record_of(*nodes).verdict is Verdict.UNPROVEN


def test_a_mode_that_is_plainly_off_passes() -> None:
    assert record_of(constant(False)).verdict is Verdict.PASS
    assert record_of(constant(True, "on"), node("Not", "on")).verdict is Verdict.PASS
    assert record_of(constant(np.int64(0), "n"), node("Cast", "n", to=9)).verdict is Verdict.PASS
