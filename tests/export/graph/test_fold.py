"""Constant propagation: constants of the graph decide a mode through deterministic operators."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evalmode.export.graph import NodeAt, graph_of

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
MODE = helper.make_tensor_value_info("mode", TensorProto.BOOL, [])
DROP = helper.make_node("Dropout", ["x", "", "m"], ["y"], name="drop")
VALUES = {
    "yes": np.True_,
    "no": np.False_,
    "one": np.int64(1),
    "half": np.float32(0.5),
    "three": np.arange(3, dtype=np.int64),
    "wide": np.zeros((4, 5000), np.float32),
    "axes": np.asarray([0], np.int64),
    "many": np.asarray([2000, 1000], np.int64),
    "two": np.asarray([2], np.int64),
    "some": np.asarray([2, 2], np.int64),
    "nan": np.float32(np.nan),
    "huge": np.float32(1e30),
}


INTEGER = numpy_helper.from_array(np.asarray([7], np.int64))


def node(op: str, *inputs: str, output: str = "m", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], **attributes)


def drop_after(
    *nodes: onnx.NodeProto,
    opset: int = 20,
    inputs: tuple[onnx.ValueInfoProto, ...] = (MODE,),
    ir_version: int = 10,
    values: dict[str, object] | None = None,
) -> NodeAt:
    constants = VALUES if values is None else values
    tensors = [
        numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()
    ]
    graph = helper.make_graph([*nodes, DROP], "main", [X, *inputs], [Y], tensors)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version
    )
    return next(node_at for node_at in graph_of(model).nodes if node_at.path == "drop")


def value_after(*nodes: onnx.NodeProto, opset: int = 20) -> object:
    constant = drop_after(*nodes, opset=opset).constant(2)
    return None if constant is None else constant.tolist()


@pytest.mark.parametrize(
    ("node_under_test", "value"),
    [
        (node("Identity", "yes"), True),
        (node("Not", "no"), True),
        (node("Not", "yes"), False),
        (node("And", "yes", "no"), False),
        (node("Or", "yes", "no"), True),
        (node("Xor", "yes", "yes"), False),
        (node("Cast", "one", to=TensorProto.BOOL), True),
        (node("Equal", "one", "one"), True),
        (node("Greater", "one", "one"), False),
        (node("Where", "no", "yes", "no"), False),
        (node("Shape", "wide"), [4, 5000]),
        (node("Shape", "wide", start=1), [5000]),
        (node("Size", "wide"), 20_000),
        (node("Gather", "three", "one"), 1),
        (node("Unsqueeze", "one", "axes"), [1]),
        (node("ConstantOfShape", "some", value=INTEGER), [[7, 7], [7, 7]]),
        (node("Expand", "one", "some"), [[1, 1], [1, 1]]),
        (node("Slice", "three", "axes", "two"), [0, 1]),
        (node("Concat", "three", "axes", axis=0), [0, 1, 2, 0]),
        (node("ReduceMax", "three", keepdims=0), 2),
    ],
    ids=lambda item: item.op_type if isinstance(item, onnx.NodeProto) else "",
)
def test_a_deterministic_operator_on_constants_is_computed(
    node_under_test: onnx.NodeProto, value: object
) -> None:
    assert value_after(node_under_test) == value


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ({"value_int": 1}, 1),
        ({"value_ints": [1, 0]}, [1, 0]),
        ({"value_float": 0.5}, 0.5),
        ({"value_floats": [0.5]}, [0.5]),
        ({"value": numpy_helper.from_array(np.asarray(True))}, True),
        ({"value_string": "True"}, None),
    ],
    ids=lambda item: next(iter(item)) if isinstance(item, dict) else "",
)
def test_each_value_attribute_of_a_constant_node_is_read(
    attribute: dict[str, object], value: object
) -> None:
    assert value_after(node("Constant", **attribute)) == value


@pytest.mark.parametrize("indices", [[1], [[1]]], ids=["flat", "by axis"])
def test_a_sparse_constant_is_read(indices: list[object]) -> None:
    values = numpy_helper.from_array(np.asarray([7.0], np.float32), "values")
    positions = numpy_helper.from_array(np.asarray(indices, np.int64), "indices")
    assert value_after(
        node("Constant", sparse_value=helper.make_sparse_tensor(values, positions, [3]))
    ) == [0, 7, 0]


def test_a_sparse_initializer_is_read_unless_it_is_also_an_input() -> None:
    values = numpy_helper.from_array(np.asarray([1.0], np.float32), "m")
    positions = numpy_helper.from_array(np.asarray([0], np.int64), "m_indices")
    for inputs, decided in (([X], True), ([X, helper.make_tensor_value_info("m", 1, [2])], False)):
        graph = helper.make_graph([DROP], "main", inputs, [Y])
        graph.sparse_initializer.append(helper.make_sparse_tensor(values, positions, [2]))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
        assert (graph_of(model).nodes[0].constant(2) is not None) is decided


def test_a_long_chain_is_followed() -> None:
    names = ["yes", *[f"n{index}" for index in range(99)], "m"]
    chain = [node("Not", before, output=after) for before, after in pairwise(names)]
    assert value_after(*chain) is True


def test_a_chain_of_20_000_nodes_is_not_folded() -> None:
    names = ["yes", *[f"n{index}" for index in range(20_000)], "m"]
    chain = [node("Identity", before, output=after) for before, after in pairwise(names)]
    assert value_after(*chain) is None


def test_a_value_that_two_inputs_read_is_computed_once() -> None:
    names = ["yes", *[f"n{index}" for index in range(200)], "m"]
    chain = [node("And", before, before, output=after) for before, after in pairwise(names)]
    assert value_after(*chain) is True


@pytest.mark.parametrize(
    "node_under_test",
    [
        node("Not", "mode"),
        node("And", "mode", "yes"),
        node("RandomUniformLike", "one"),
        node("Dropout", "yes"),
        node("Shape", "x"),
        node("Unheard", "yes"),
        node("Not", "yes", domain="my"),
        node("IsNaN", "nan"),
        node("Less", "half", "half"),
        node("ConstantOfShape", "some"),
        node("Cast", "huge", to=TensorProto.INT32),
        node("Not"),
        node("Cast", "yes"),
        node("Cast", "yes", to=999),
    ],
    ids=[
        "caller",
        "half a caller",
        "draw",
        "dropout",
        "run time",
        "unknown",
        "foreign",
        "nan",
        "floats compared",
        "floats made",
        "huge",
        *"abc",
    ],
)
def test_an_undetermined_or_unsupported_node_decides_nothing(
    node_under_test: onnx.NodeProto,
) -> None:
    assert value_after(node_under_test) is None


@pytest.mark.parametrize(
    "nodes",
    [
        [node("ConstantOfShape", "many")],
        [node("Expand", "one", "many")],
        [node("Identity", "wide")],
        [node("Constant", output="a", value_ints=[1] * 5000), node("ReduceMax", "a", keepdims=0)],
        [node("Concat", *["wide"] * 1000, axis=0)],
        [node("Cast", "row", output="a", to=TensorProto.DOUBLE), node("Add", "a", "column")],
    ],
    ids=["ConstantOfShape", "Expand", "large", "long", "joined", "broadcast"],
)
def test_a_large_result_is_not_computed(nodes: list[onnx.NodeProto]) -> None:
    values = VALUES | {"row": np.zeros(1000, np.int64), "column": np.zeros((1000, 1))}
    drop = drop_after(*nodes, values=values)
    # The first computation imports modules, whose memory must not count.
    value_after(node("ConstantOfShape", "some"))
    tracemalloc.start()
    try:
        assert drop.constant(2) is None
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_a_large_mode_is_not_read() -> None:
    assert drop_after(values={"m": np.zeros(5000, np.bool_)}, inputs=()).constant(2) is None


def test_a_second_output_and_a_second_attribute_decide_nothing() -> None:
    identity = helper.make_node("Identity", ["yes"], ["other", "m"])
    assert value_after(identity) is None
    assert value_after(node("Constant", value_int=1, value_float=0.0)) is None


def test_the_broadcast_attribute_from_before_opset_7_decides_nothing() -> None:
    conjunction = node("And", "yes", "yes", broadcast=1)
    assert value_after(conjunction, opset=6) is None


def if_node(condition: str) -> onnx.NodeProto:
    graphs = {}
    for name, value in (("then_branch", True), ("else_branch", False)):
        inner = node(
            "Constant", output=f"in_{name}", value=numpy_helper.from_array(np.asarray(value))
        )
        output = helper.make_tensor_value_info(f"in_{name}", TensorProto.BOOL, [])
        graphs[name] = helper.make_graph([inner], name, [], [output])
    return node("If", condition, **graphs)


@pytest.mark.parametrize(("condition", "value"), [("yes", True), ("no", False), ("mode", None)])
def test_a_branch_is_followed_where_its_condition_is_decided(
    condition: str, value: bool | None
) -> None:
    assert value_after(if_node(condition)) is value


def test_a_constant_from_an_attribute_of_the_call_is_read() -> None:
    constant = helper.make_node("Constant", [], ["n"])
    constant.attribute.add(name="value_int", ref_attr_name="mode", type=onnx.AttributeProto.INT)
    cast = helper.make_node("Cast", ["n"], ["m"], to=TensorProto.BOOL)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("my", 1)]
    function = helper.make_function(
        "my", "f", ["x"], ["y"], [constant, cast, DROP], opsets, ["mode"]
    )
    modes = []
    for mode in (0, 1):
        call = helper.make_node("f", ["x"], ["y"], domain="my", name="call", mode=mode)
        graph = helper.make_graph([call], "main", [X], [Y])
        nodes = graph_of(helper.make_model(graph, opset_imports=opsets, functions=[function])).nodes
        modes.append(
            next(node_at for node_at in nodes if node_at.path == "call/my:f/drop").constant(2)
        )
    assert [value is not None and bool(value) for value in modes] == [False, True]


OVERRIDABLE_MODE = helper.make_tensor_value_info("m", TensorProto.BOOL, [])


@pytest.mark.parametrize(
    ("ir_version", "decided"), [(0, False), (3, True), (4, False), (10, False)]
)
def test_an_initializer_that_is_also_an_input_decides_only_in_ir_version_3(
    ir_version: int, decided: bool
) -> None:
    drop = drop_after(inputs=(OVERRIDABLE_MODE,), ir_version=ir_version, values={"m": False})
    assert (drop.constant(2) is not None) is decided


@pytest.mark.parametrize(
    ("nodes", "inputs", "reason"),
    [
        (
            (),
            (OVERRIDABLE_MODE,),
            "the initializer 'm', which is an input too: the caller may override it",
        ),
        (
            (node("Not", "mode"),),
            (MODE,),
            "computed by Not_0 (Not) from the model's input 'mode': the caller decides",
        ),
        (
            (node("RandomUniform", output="n", shape=[1]), node("Cast", "n", to=TensorProto.BOOL)),
            (),
            "computed by Cast_1 (Cast) when the model runs",
        ),
    ],
    ids=["override", "computed", "drawn"],
)
def test_the_reason_names_the_node_or_input_that_decides(
    nodes: tuple[onnx.NodeProto, ...], inputs: tuple[onnx.ValueInfoProto, ...], reason: str
) -> None:
    drop = drop_after(*nodes, inputs=inputs, values={} if nodes else {"m": False})
    assert drop.constant(2) is None
    assert drop.decider(2) == reason
