"""What confirms the certificates finds what is wrong with a graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Generator, Tensor, nn

from tests.zoo.confirm import confirm, drawing_nodes
from tests.zoo.entry import Entry, Sample


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, x > 0


def batch(generator: Generator, rows: int) -> Sample:
    return {"x": torch.randn(rows, 4, generator=generator)}


DOUBLED = Entry(
    name="doubled",
    family="test",
    factory=Doubled,
    batch=batch,
    sizes=((2,),),
    fresh_sizes=((3,), (1,)),
)


def model(factor: float, *extra: NodeProto, threshold: float = 0) -> onnx.ModelProto:
    """`x * factor` and `x > threshold`, with further nodes beside them."""
    nodes = [
        helper.make_node("Mul", ["x", "factor"], ["doubled"]),
        helper.make_node("Greater", ["x", "threshold"], ["positive"]),
        *extra,
    ]
    constants = [
        numpy_helper.from_array(np.asarray(value, np.float32), name)
        for name, value in (("factor", factor), ("threshold", threshold))
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [
            helper.make_tensor_value_info("doubled", TensorProto.FLOAT, ["batch", 4]),
            helper.make_tensor_value_info("positive", TensorProto.BOOL, ["batch", 4]),
        ],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def confirmed(tmp_path: Path, written: onnx.ModelProto) -> float:
    onnx.save(written, tmp_path / "model.onnx")
    return confirm(DOUBLED, Doubled(), tmp_path / "model.onnx")


def test_the_graph_of_the_network_is_confirmed(tmp_path: Path) -> None:
    assert confirmed(tmp_path, model(2)) == 0


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (model(2.001), "doubled differs by"),
        (model(2, threshold=0.5), "positive"),
        (model(2, helper.make_node("RandomNormalLike", ["x"], ["noise"])), "RandomNormalLike"),
    ],
    ids=["another factor", "another threshold", "noise"],
)
def test_another_graph_is_not_confirmed(
    tmp_path: Path, written: onnx.ModelProto, reason: str
) -> None:
    with pytest.raises(AssertionError, match=reason):
        confirmed(tmp_path, written)


def inside_a_branch(node: NodeProto) -> NodeProto:
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    branch = helper.make_graph([node], "branch", [], [value])
    return helper.make_node("If", ["mode"], ["y"], then_branch=branch, else_branch=branch)


@pytest.mark.parametrize(
    ("nodes", "count"),
    [
        ([helper.make_node("Dropout", ["x"], ["y"])], 0),
        ([helper.make_node("Dropout", ["x", "rate", "mode"], ["y"])], 1),
        ([helper.make_node("Multinomial", ["x"], ["y"])], 1),
        ([inside_a_branch(helper.make_node("Bernoulli", ["x"], ["y"]))], 2),
    ],
    ids=["dropout in eval mode", "dropout with a mode", "multinomial", "two branches"],
)
def test_every_node_that_may_draw_is_found_in_graphs_and_functions(
    nodes: Sequence[NodeProto], count: int
) -> None:
    function = helper.make_function("own", "f", ["x"], ["y"], nodes, [])
    assert len(list(drawing_nodes(model(2, *nodes)))) == count
    written = model(2)
    written.functions.append(function)
    assert len(list(drawing_nodes(written))) == count
