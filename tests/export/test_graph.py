"""Walking a model: what stands in a body is seen, under the constants and the opset that hold there."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evalmode.export.graph import ModelUnreadable, NodeAt, read_model, walk

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
M = helper.make_tensor_value_info("m", TensorProto.BOOL, [])
DROP = helper.make_node("Dropout", ["x", "", "m"], ["y"], name="drop")
ON = numpy_helper.from_array(np.asarray(True), "m")


def model_of(
    *nodes: onnx.NodeProto, initializers: tuple[onnx.TensorProto, ...] = (), **extra: object
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "main", [X], [Y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], **extra)


def body(*nodes: onnx.NodeProto, inputs: tuple[onnx.ValueInfoProto, ...] = ()) -> onnx.GraphProto:
    return helper.make_graph(nodes, "body", inputs, [Y])


def at(model: onnx.ModelProto, path: str) -> NodeAt:
    (found,) = [one for one in walk(model) if one.path == path]
    return found


def test_an_attribute_that_holds_several_graphs_is_walked_too() -> None:
    many = helper.make_node("Many", ["x"], ["y"], name="many", domain="my", bodies=[body(DROP), body(DROP)])
    assert [one.path for one in walk(model_of(many))] == ["many", "many/bodies/drop", "many/bodies/drop"]


def test_a_constant_of_the_outer_graph_is_visible_in_a_body_at_any_depth() -> None:
    inner = helper.make_node("If", ["c"], ["y"], name="inner", then_branch=body(DROP), else_branch=body(DROP))
    outer = helper.make_node("If", ["c"], ["y"], name="outer", then_branch=body(inner), else_branch=body(DROP))
    mode = at(model_of(outer, initializers=(ON,)), "outer/then_branch/inner/else_branch/drop").constant(2)
    assert mode is not None
    assert mode.all()


def test_a_constant_node_before_a_body_is_visible_in_it() -> None:
    constant = helper.make_node("Constant", [], ["m"], value=ON)
    branch = helper.make_node("If", ["c"], ["y"], name="if", then_branch=body(DROP), else_branch=body(DROP))
    assert at(model_of(constant, branch), "if/then_branch/drop").constant(2) is not None


def test_an_input_of_a_body_hides_the_outer_constant_of_its_name() -> None:
    loop = helper.make_node("Loop", ["n", "c", "z"], ["y"], name="loop", body=body(DROP, inputs=(M,)))
    assert at(model_of(loop, initializers=(ON,)), "loop/body/drop").constant(2) is None


def test_a_constant_of_a_body_stays_in_it() -> None:
    inside = body(helper.make_node("Constant", [], ["m"], value=ON))
    branch = helper.make_node("If", ["c"], ["z"], name="if", then_branch=inside, else_branch=inside)
    assert at(model_of(branch, DROP), "drop").constant(2) is None


def test_a_function_does_not_see_the_constants_of_the_graph_that_calls_it() -> None:
    function = helper.make_function("my", "f", ["x", "m"], ["y"], [DROP], [helper.make_opsetid("", 6)])
    found = at(model_of(DROP, initializers=(ON,), functions=[function]), "my:f/drop")
    assert found.constant(2) is None
    assert found.opset == 6


def test_the_long_name_of_onnxs_own_domain_is_the_short_one() -> None:
    model = model_of(helper.make_node("Dropout", ["x"], ["y"], name="drop", domain="ai.onnx"))
    assert (at(model, "drop").domain, at(model, "drop").opset) == ("", 20)


def test_a_constant_in_a_file_beside_the_model_is_not_read() -> None:
    outside = TensorProto(name="m", data_type=TensorProto.BOOL, dims=[1], data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="weights.bin")
    assert at(model_of(DROP, initializers=(outside,)), "drop").constant(2) is None


@pytest.mark.parametrize(
    "tensor",
    [
        TensorProto(name="m"),
        TensorProto(name="m", data_type=999, dims=[1], raw_data=b"\1"),
        TensorProto(name="m", data_type=TensorProto.FLOAT, dims=[4], raw_data=b"abc"),
    ],
    ids=["no type", "unknown type", "too short"],
)
def test_a_malformed_constant_decides_nothing(tensor: onnx.TensorProto) -> None:
    assert at(model_of(DROP, initializers=(tensor,)), "drop").constant(2) is None


@pytest.mark.parametrize("opset", [-1, 0, 2**40])
def test_an_opset_that_there_cannot_be_is_unreadable(opset: int) -> None:
    model = model_of(DROP)
    model.opset_import[0].version = opset
    with pytest.raises(ModelUnreadable, match=f"some.onnx is not an ONNX model: opset {opset}"):
        read_model(model.SerializeToString(), name="some.onnx")
