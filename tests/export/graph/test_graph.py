"""Walking a model: nodes in bodies and functions are visited, with the values and the opset that
apply to them there.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evalmode.export.graph import Graph, ModelUnreadable, NodeAt, graph_of, read_graph

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
C = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
DROP = helper.make_node("Dropout", ["x", "", "m"], ["y"], name="drop")
ON, OFF = (numpy_helper.from_array(np.asarray(value), "m") for value in (True, False))
OPSETS = [helper.make_opsetid("", 20), helper.make_opsetid("my", 1)]


def model_of(
    *nodes: onnx.NodeProto,
    inputs: tuple[onnx.ValueInfoProto, ...] = (X, C),
    initializers: tuple[onnx.TensorProto, ...] = (),
    functions: tuple[onnx.FunctionProto, ...] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "main", inputs, [Y], initializers)
    return helper.make_model(graph, opset_imports=OPSETS, functions=functions, ir_version=10)


def body(*nodes: onnx.NodeProto, inputs: tuple[onnx.ValueInfoProto, ...] = ()) -> onnx.GraphProto:
    return helper.make_graph(nodes, "body", inputs, [Y])


def function(
    *nodes: onnx.NodeProto,
    name: str = "f",
    opset: int = 20,
    attributes: tuple[str, ...] = (),
    **defaults: object,
) -> onnx.FunctionProto:
    protos = [helper.make_attribute(key, value) for key, value in defaults.items()]
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("my", 1)]
    return helper.make_function("my", name, ["x", "m"], ["y"], nodes, imports, attributes, protos)


def call(
    *inputs: str, name: str = "call", function: str = "f", **attributes: object
) -> onnx.NodeProto:
    return helper.make_node(function, inputs, ["y"], name=name, domain="my", **attributes)


def branch(
    name: str, then: onnx.GraphProto, otherwise: onnx.GraphProto, output: str = "y"
) -> onnx.NodeProto:
    return helper.make_node(
        "If", ["c"], [output], name=name, then_branch=then, else_branch=otherwise
    )


def node_at_path(model: onnx.ModelProto | Graph, path: str) -> NodeAt:
    graph = model if isinstance(model, Graph) else graph_of(model)
    (node_at,) = [candidate for candidate in graph.nodes if candidate.path == path]
    return node_at


def flag_node() -> onnx.NodeProto:
    node = helper.make_node("BatchNormalization", ["x"] * 5, ["y"], name="norm")
    node.attribute.add(name="training_mode", ref_attr_name="flag", type=onnx.AttributeProto.INT)
    return node


def test_each_graph_of_an_attribute_with_several_graphs_is_walked() -> None:
    many = helper.make_node(
        "Many", ["x"], ["y"], name="many", domain="my", bodies=[body(DROP), body(DROP)]
    )
    paths = [node.path for node in graph_of(model_of(many, initializers=(ON,))).nodes]
    assert paths == ["many", "many/bodies/drop", "many/bodies/drop"]


def test_a_node_without_a_name_has_its_operator_and_its_index_as_path() -> None:
    model = model_of(helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Relu", ["h"], ["y"]))
    assert [node.path for node in graph_of(model).nodes] == ["Relu_0", "Relu_1"]


def test_an_outer_constant_is_visible_in_a_body_at_any_depth() -> None:
    inner = branch("inner", body(DROP), body(DROP))
    model = model_of(branch("outer", body(inner), body(DROP)), initializers=(ON,))
    mode = node_at_path(model, "outer/then_branch/inner/else_branch/drop").constant(2)
    assert mode is not None
    assert mode.all()


def test_a_constant_node_before_a_body_is_visible_in_it() -> None:
    constant = helper.make_node("Constant", [], ["m"], value=ON)
    model = model_of(constant, branch("if", body(DROP), body(DROP)))
    assert node_at_path(model, "if/then_branch/drop").constant(2) is not None


def test_an_input_of_a_body_hides_the_outer_constant_of_its_name() -> None:
    loops = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("m", 9, []),
    ]
    inner = helper.make_graph([DROP], "body", loops, [loops[1], Y])
    loop = helper.make_node("Loop", ["", "c"], ["y"], name="loop", body=inner)
    drop = node_at_path(model_of(loop, initializers=(OFF,)), "loop/body/drop")
    assert drop.constant(2) is None
    assert drop.decider(2) == "'m', an input of a body"


def test_two_branches_may_use_the_same_name_for_different_values() -> None:
    then, otherwise = (
        body(helper.make_node("Constant", [], ["m"], value=value), DROP) for value in (ON, OFF)
    )
    graph = graph_of(model_of(branch("if", then, otherwise)))
    modes = [
        node_at_path(graph, f"if/{name}/drop").constant(2)
        for name in ("then_branch", "else_branch")
    ]
    assert [mode is not None and bool(mode) for mode in modes] == [True, False]


def test_a_function_is_walked_at_each_call_with_the_inputs_of_that_call() -> None:
    on, off = (
        numpy_helper.from_array(np.asarray(value), name)
        for name, value in (("on", True), ("off", False))
    )
    first = helper.make_node("f", ["x", "on"], ["h"], name="first", domain="my")
    second = helper.make_node("f", ["h", "off"], ["y"], name="second", domain="my")
    graph = graph_of(model_of(first, second, initializers=(on, off), functions=(function(DROP),)))
    modes = [node_at_path(graph, f"{name}/my:f/drop").constant(2) for name in ("first", "second")]
    assert [mode is not None and bool(mode) for mode in modes] == [True, False]


def test_a_value_is_followed_through_functions_that_call_functions() -> None:
    negated = helper.make_node("Not", ["m"], ["n"])
    outer = function(negated, call("x", "n", name="inner"), name="g")
    model = model_of(
        call("x", "m", function="g"), initializers=(OFF,), functions=(function(DROP), outer)
    )
    mode = node_at_path(model, "call/my:g/inner/my:f/drop").constant(2)
    assert mode is not None
    assert mode.all()


def test_a_value_is_followed_out_of_a_function() -> None:
    mode = helper.make_function(
        "my", "mode", [], ["m"], [helper.make_node("Constant", [], ["m"], value=ON)], OPSETS
    )
    call_of_mode = helper.make_node("mode", [], ["m"], domain="my")
    assert (
        node_at_path(model_of(call_of_mode, DROP, functions=(mode,)), "drop").constant(2)
        == np.True_
    )


def test_an_input_that_the_caller_leaves_out_is_absent_in_the_function() -> None:
    for inputs in (("x",), ("x", "")):
        assert not node_at_path(
            model_of(call(*inputs), functions=(function(DROP),)), "call/my:f/drop"
        ).has_input(2)


def test_a_function_does_not_see_the_names_of_the_calling_graph() -> None:
    inner = helper.make_function("my", "f", ["x"], ["y"], [DROP], OPSETS)
    with pytest.raises(
        ModelUnreadable, match="the input 'm' of the node 'call/my:f/drop' is defined by nothing"
    ):
        graph_of(model_of(call("x"), initializers=(ON,), functions=(inner,)))


def test_a_function_has_the_opset_of_its_own_imports() -> None:
    model = model_of(call("x"), functions=(function(DROP, opset=6),))
    assert node_at_path(model, "call/my:f/drop").opset == 6


@pytest.mark.parametrize(
    ("attributes", "flag"), [({"flag": 1}, True), ({"flag": 0}, False), ({}, False)]
)
def test_an_attribute_of_a_call_reaches_the_node_that_refers_to_it(
    attributes: dict[str, int], flag: bool
) -> None:
    model = model_of(
        call("x", **attributes), functions=(function(flag_node(), attributes=("flag",)),)
    )
    assert node_at_path(model, "call/my:f/norm").flag("training_mode") is flag


def test_an_attribute_that_the_call_omits_has_the_default_of_the_function() -> None:
    model = model_of(call("x"), functions=(function(flag_node(), flag=1),))
    assert node_at_path(model, "call/my:f/norm").flag("training_mode") is True


def test_an_attribute_is_passed_on_from_call_to_call() -> None:
    inner = call("x", name="inner")
    inner.attribute.add(name="flag", ref_attr_name="flag", type=onnx.AttributeProto.INT)
    functions = (function(flag_node(), flag=0), function(inner, name="g", flag=0))
    model = model_of(call("x", function="g", flag=1), functions=functions)
    assert node_at_path(model, "call/my:g/inner/my:f/norm").flag("training_mode") is True


def test_an_attribute_of_a_call_reaches_a_body_in_the_function() -> None:
    condition = helper.make_node("Constant", [], ["c"], value=ON)
    inner = function(
        condition, branch("if", body(flag_node()), body(flag_node())), attributes=("flag",)
    )
    model = model_of(call("x", flag=1), functions=(inner,))
    assert node_at_path(model, "call/my:f/if/then_branch/norm").flag("training_mode") is True


def test_a_graph_that_is_the_default_of_an_attribute_is_walked() -> None:
    bodies = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], name="inside")], "body", [], [Y]
    )
    with_default = function(helper.make_node("Relu", ["x"], ["y"]), then=bodies)
    assert "call/my:f/then/inside" in [
        node.path for node in graph_of(model_of(call("x"), functions=(with_default,))).nodes
    ]


def test_an_uncalled_function_is_walked_with_unknown_inputs() -> None:
    relu = helper.make_node("Relu", ["x"], ["y"])
    graph = graph_of(
        model_of(
            relu, functions=(function(DROP), function(flag_node(), name="g", attributes=("flag",)))
        )
    )
    assert node_at_path(graph, "my:f/drop").constant(2) is None
    assert (
        node_at_path(graph, "my:f/drop").decider(2)
        == "'m', an input of a function that nothing calls"
    )
    assert node_at_path(graph, "my:g/norm").flag("training_mode") is None


def test_a_function_that_only_a_dead_function_calls_is_walked_from_that_call() -> None:
    relu = helper.make_node("Relu", ["x"], ["y"])
    functions = (function(DROP), function(call("x"), name="dead"))
    paths = [node.path for node in graph_of(model_of(relu, functions=functions)).nodes]
    assert paths == ["Relu_0", "my:dead/call", "my:dead/call/my:f/drop"]


def test_only_nodes_below_a_dead_function_are_dead() -> None:
    functions = (function(DROP), function(call("x"), name="dead"))
    is_dead = {
        node.path: node.is_dead for node in graph_of(model_of(call("x"), functions=functions)).nodes
    }
    assert is_dead == {
        "call": False,
        "call/my:f/drop": False,
        "my:dead/call": True,
        "my:dead/call/my:f/drop": True,
    }


def test_a_flag_that_is_not_an_integer_is_unknown() -> None:
    norm = helper.make_node("BatchNormalization", ["x"] * 5, ["y"], name="norm", training_mode=1.0)
    assert node_at_path(model_of(norm), "norm").flag("training_mode") is None


def test_an_attribute_reference_outside_a_function_is_unknown() -> None:
    assert node_at_path(model_of(flag_node()), "norm").flag("training_mode") is None


def test_the_domain_ai_onnx_is_normalised_to_the_empty_string() -> None:
    model = model_of(helper.make_node("Dropout", ["x"], ["y"], name="drop", domain="ai.onnx"))
    assert (
        node_at_path(model, "drop").domain,
        node_at_path(model, "drop").opset,
        node_at_path(model, "drop").op,
    ) == (
        "",
        20,
        "Dropout",
    )


def test_the_weights_of_every_graph_and_function_are_listed_once() -> None:
    inner = helper.make_node("Constant", [], ["w"], value=ON)
    in_function = function(inner, helper.make_node("Relu", ["x"], ["y"]))
    calls = [helper.make_node("f", ["x"], ["h"], domain="my"), call("h")]
    then = helper.make_graph(
        [helper.make_node("Identity", ["v"], ["z"])],
        "then",
        [],
        [helper.make_tensor_value_info("z", 1, [3])],
    )
    then.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "v"))
    chosen = branch("if", then, then, "z")
    graph = graph_of(model_of(*calls, chosen, initializers=(ON,), functions=(in_function,)))
    paths = sorted(weight.path for weight in graph.weights)
    assert paths == ["f_0/my:f/w", "if/else_branch/v", "if/then_branch/v", "m"]


def test_a_serialised_graph_is_read_with_its_nodes_and_weights() -> None:
    model = model_of(DROP, initializers=(ON, numpy_helper.from_array(np.arange(5000.0), "large")))
    graph = read_graph(model.SerializeToString(), name="some.onnx")
    assert [node.path for node in graph.nodes] == ["drop"]
    assert {weight.name: weight.size for weight in graph.weights} == {"m": 1, "large": 5000}
    assert len(graph.proto.SerializeToString()) < 1000
