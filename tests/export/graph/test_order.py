"""The nodes of the main graph may be written in any order, as in ONNX Runtime; those of a body must
be sorted.
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


def runtime_answer(model: onnx.ModelProto) -> list[float] | None:
    """The output of ONNX Runtime, or None if it refuses the model."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options)
    except Exception:  # ONNX Runtime's exceptions share no base class
        return None
    feeds = {"x": np.arange(4, dtype=np.float32), "c": np.asarray(True)}
    (output,) = session.run(None, feeds)
    answer: list[float] = output.tolist()
    return answer


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
RELU_FUNCTION = helper.make_function("my", "f", ["x"], ["z"], [node("Relu", "x", "z")], OPSETS)


@pytest.mark.parametrize("seed", range(10))
def test_nodes_of_the_main_graph_may_have_any_order(seed: int) -> None:
    nodes = list(IN_ORDER)
    random.Random(seed).shuffle(nodes)
    model = model_of(*nodes, functions=(RELU_FUNCTION,))
    assert runtime_answer(model) == [0, 1, 2, 3]
    graph = graph_of(model)
    assert {node_at.path for node_at in graph.nodes} >= {"a", "b/then_branch/t", "d/my:f/z", "y"}
    (drop,) = (node_at for node_at in graph.nodes if node_at.path == "y")
    mode = drop.constant(2)
    assert mode is not None
    assert not mode.any()


def test_a_node_without_a_name_keeps_the_index_in_the_file() -> None:
    nodes = [node("Relu", "a", "y"), node("Neg", "x", "a")]
    for unnamed in nodes:
        unnamed.name = ""
    assert {node_at.path for node_at in graph_of(model_of(*nodes)).nodes} == {"Relu_0", "Neg_1"}


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
def test_a_cycle_or_an_unsorted_body_is_refused(model: onnx.ModelProto) -> None:
    assert runtime_answer(model) is None
    with pytest.raises(ModelUnreadable, match="the nodes are not sorted, or form a cycle"):
        graph_of(model)


def test_a_name_that_a_body_and_a_later_node_define_decides_nothing() -> None:
    """Which of the two values a runtime reads may depend on the order in which it sorts."""
    inner = body(node("Not", "m", "t"), node("Identity", "true", "m"))
    inner.node.reverse()
    nodes = [
        node("Dropout", "x half late", "y"),
        node("Constant", "", "half", value_float=0.5),
        node("If", "true", "late", then_branch=inner, else_branch=inner),
        node("Not", "true", "m"),
    ]
    inner.output[0].name = "t"
    (drop,) = (node_at for node_at in graph_of(model_of(*nodes)).nodes if node_at.path == "y")
    assert drop.constant(2) is None
