"""Files that ONNX Runtime loads, and on which it aborts, hangs or takes memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def _floats(name: str, shape: list[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _save(
    path: Path, nodes: list[onnx.NodeProto], *constants: onnx.TensorProto, opset: int = 17
) -> Path:
    """Save a model whose input `x` and output `y` have the shape (2, 3)."""
    x, y = _floats("x", [2, 3]), helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def quiet(path: Path) -> Path:
    return _save(path, [helper.make_node("Relu", ["x"], ["y"])])


def aborts(path: Path) -> Path:
    """A normal distribution with scale 0, on which an assertion of the runtime aborts."""
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["z"], scale=0.0),
        helper.make_node("Add", ["x", "z"], ["y"]),
    ]
    return _save(path, nodes)


def violates_memory(path: Path) -> Path:
    """A BatchNormalization with unnamed optional outputs."""
    node = helper.make_node("BatchNormalization", ["x", *"smbv"], ["y", "", "", "", ""])
    ones = [numpy_helper.from_array(np.ones(3, np.float32), name) for name in "smbv"]
    return _save(path, [node], *ones, opset=8)


def hangs(path: Path) -> Path:
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Identity", ["v"], ["w"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            _floats("v", [2, 3]),
        ],
        [helper.make_tensor_value_info("d", TensorProto.BOOL, []), _floats("w", [2, 3])],
    )
    count = numpy_helper.from_array(np.asarray(2**62), "n")
    always = numpy_helper.from_array(np.asarray(True), "c")
    return _save(path, [helper.make_node("Loop", ["n", "c", "x"], ["y"], body=body)], count, always)


def takes_memory(path: Path, bytes_: int) -> Path:
    shape = numpy_helper.from_array(np.asarray([bytes_ // 24, 2, 3]), "s")
    nodes = [
        helper.make_node("Expand", ["x", "s"], ["z"]),
        helper.make_node("ReduceSum", ["z"], ["y"], keepdims=0),
    ]
    return _save(path, nodes, shape)
