"""Certified bundles whose models hang or abort ONNX Runtime; their hashes and certificates hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto, helper

from evalmode.bundle.known_answers import KnownAnswer
from evalmode.bundle.session import open_session
from tests.service.bundles import onnx_model, written

_X = np.zeros((1, 3), np.float32)


def hanging_when_run(root: Path, *, name: str = "tensors", version: str = "1") -> Path:
    """A loop of 2^62 iterations."""
    node, info = helper.make_node, helper.make_tensor_value_info
    body = helper.make_graph(
        [node("Identity", ["go_on"], ["still"]), node("Identity", ["value"], ["next"])],
        "body",
        [
            info("i", TensorProto.INT64, []),
            info("go_on", TensorProto.BOOL, []),
            info("value", TensorProto.FLOAT, None),
        ],
        [info("still", TensorProto.BOOL, []), info("next", TensorProto.FLOAT, None)],
    )
    nodes = [node("Loop", ["count", "always", "x"], ["y"], body=body)]
    weights = {"count": np.array(2**62), "always": np.array(True)}
    return _bundle(root, nodes, weights, name=name, version=version)


def hanging_when_opened(root: Path, *, name: str = "tensors", version: str = "1") -> Path:
    """A thousand products of large matrices, which the optimiser computes while a session is
    made.
    """
    node = helper.make_node
    nodes = [
        node("Expand", ["half", "large"], ["m0"]),
        *(node("MatMul", [f"m{i}", f"m{i}"], [f"m{i + 1}"]) for i in range(1_000)),
        node("ReduceSum", ["m1000"], ["sum"], keepdims=0),
        node("Add", ["x", "sum"], ["y"]),
    ]
    weights = {"half": np.array([0.5], np.float32), "large": np.array([2_000, 2_000])}
    return _bundle(root, nodes, weights, name=name, version=version)


def aborting(root: Path) -> Path:
    """A normal distribution without a spread, on which ONNX Runtime aborts its process."""
    node = helper.make_node
    nodes = [
        node("RandomNormalLike", ["x"], ["noise"], scale=0.0),
        node("Add", ["x", "noise"], ["y"]),
    ]
    return _bundle(root, nodes, {})


def harmless(root: Path, *, name: str = "tensors", version: str = "1") -> Path:
    """A bundle with the tensors of the others, and a model that does no harm."""
    return _bundle(root, [helper.make_node("Identity", ["x"], ["y"])], {}, name, version)


def _bundle(
    root: Path,
    nodes: list[NodeProto],
    weights: dict[str, np.ndarray],
    name: str = "tensors",
    version: str = "1",
) -> Path:
    x, y = (
        helper.make_tensor_value_info(tensor, TensorProto.FLOAT, ["batch", 3]) for tensor in "xy"
    )
    identity = [helper.make_node("Identity", ["x"], ["y"])]
    return written(
        root,
        onnx_model(nodes, inputs=[x], outputs=[y], weights=weights),
        # Its own session could not be made here; the tensors of this one are the same.
        open_session(onnx_model(identity, inputs=[x], outputs=[y])),
        (KnownAnswer(inputs={"x": _X}, outputs={"y": _X}),),
        lambda certificate: certificate,
        name=name,
        version=version,
    )
