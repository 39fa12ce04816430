"""Nodes of the main graph may be written in any order, as ONNX Runtime reads them; those of bodies
may not.
"""

from __future__ import annotations

import random

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from evalmode.export.graph import ModelUnreadable, graph_of

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
C = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
OPSETS = [helper.make_opsetid("", 20), helper.make_opsetid("my", 1)]


def node(op: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    domain = "my" if op.islower() else ""
    return helper.make_node(op, inputs.split(), [output], domain=domain, name=output, **attributes)


def body(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(nodes, "body", [], [onnx.ValueInfoProto(name=nodes[0].output[0])])


def model_of(
    *nodes: onnx.NodeProto, functions: tuple[onnx.FunctionProto, ...] = ()
) -> onnx.ModelProto:
    true = numpy_helper.from_array(np.asarray(True), "true")
    graph = helper.make_graph(nodes, "main", [X, C], [Y], [true])
    return helper.make_model(graph, opset_imports=OPSETS, functions=functions, ir_version=10)


def answer(model: onnx.ModelProto) -> list[float] | None:
    """What ONNX Runtime answers; None where it refuses the model."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options)
    except Exception:  # ONNX Runtime's exceptions share no base class
        return None
    feeds = {"x": np.arange(4, dtype=np.float32), "c": np.asarray(True)}
    (y,) = session.run(None, feeds)
    numbers: list[float] = y.tolist()
    return numbers


IN_ORDER = (
    node("Neg", "x", "a"),
    node(
        "If",
        "c",
        "b",
        then_branch=body(node("Abs", "a", "t")),
        else_branch=body(node("Neg", "a", "e")),
    ),
    node("f", "b", "d"),
    node("Not", "true", "off"),
    node("Constant", "", "half", value_float=0.5),
    node("Dropout", "d half off", "y"),
)
F = helper.make_function("my", "f", ["x"], ["z"], [node("Relu", "x", "z")], OPSETS)


@pytest.mark.parametrize("seed", range(10))
def test_nodes_in_any_order_are_read_as_the_runtime_runs_them(seed: int) -> None:
    nodes = list(IN_ORDER)
    random.Random(seed).shuffle(nodes)
    model = model_of(*nodes, functions=(F,))
    assert answer(model) == [0, 1, 2, 3]
    graph = graph_of(model)
    assert {at.path for at in graph.nodes} >= {"a", "b/then_branch/t", "d/my:f/z", "y"}
    (drop,) = (at for at in graph.nodes if at.path == "y")
    mode = drop.constant(2)
    assert mode is not None
    assert not mode.any()


def test_a_node_without_a_name_keeps_the_number_that_it_is_written_at() -> None:
    nodes = [node("Relu", "a", "y"), node("Neg", "x", "a")]
    for unnamed in nodes:
        unnamed.name = ""
    assert {at.path for at in graph_of(model_of(*nodes)).nodes} == {"Relu_0", "Neg_1"}


@pytest.mark.parametrize(
    "model",
    [
        model_of(node("Add", "x b", "a"), node("Relu", "a", "b"), node("Relu", "a", "y")),
        model_of(
            node(
                "If",
                "c",
                "a",
                then_branch=body(node("Relu", "b", "t")),
                else_branch=body(node("Relu", "x", "e")),
            ),
            node("Relu", "a", "b"),
            node("Relu", "b", "y"),
        ),
        model_of(
            node(
                "If",
                "c",
                "y",
                then_branch=body(node("Relu", "q", "t"), node("Relu", "x", "q")),
                else_branch=body(node("Relu", "x", "e")),
            )
        ),
    ],
    ids=["a cycle", "a cycle through a body", "a body that is not sorted"],
)
def test_what_the_runtime_refuses_is_refused(model: onnx.ModelProto) -> None:
    assert answer(model) is None
    with pytest.raises(ModelUnreadable, match="the nodes are not sorted, or form a cycle"):
        graph_of(model)


def test_a_name_of_a_body_that_a_later_node_makes_too_decides_nothing() -> None:
    """Which of both a reader takes may hang on the order in which it sorts."""
    inner = body(node("Not", "m", "t"), node("Identity", "true", "m"))
    inner.node.reverse()
    nodes = [
        node("Dropout", "x half late", "y"),
        node("Constant", "", "half", value_float=0.5),
        node("If", "true", "late", then_branch=inner, else_branch=inner),
        node("Not", "true", "m"),
    ]
    inner.output[0].name = "t"
    (drop,) = (at for at in graph_of(model_of(*nodes)).nodes if at.path == "y")
    assert drop.constant(2) is None
