"""Bundles with valid hashes and certificates whose models hang or abort ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto, helper

from evalmode.bundle.known_answers import KnownAnswer
from evalmode.bundle.session import open_session
from tests.service.bundles import onnx_model, tensor_bundle, write_certified

_X = np.zeros((1, 3), np.float32)


def hanging_when_run(root: Path, *, name: str = "tensors", version: str = "1") -> Path:
    """A loop of 2^62 iterations."""
    weights = {"count": np.array(2**62), "always": np.array(True)}
    return _bundle(root, [_loop()], weights, name=name, version=version)


def hanging_when_batched(root: Path) -> Path:
    """A loop of 2^62 iterations for each row beyond the first."""
    node, info = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("Shape", ["x"], ["rows"], end=1),
        node("Sub", ["rows", "one"], ["more"]),
        node("Mul", ["more", "many"], ["counts"]),
        node("Squeeze", ["counts"], ["count"]),
        _loop(),
    ]
    weights = {"one": np.array([1]), "many": np.array([2**62]), "always": np.array(True)}
    x, y = (info(tensor, TensorProto.FLOAT, ["batch", 3]) for tensor in "xy")
    model = onnx_model(nodes, inputs=[x], outputs=[y], weights=weights)
    return tensor_bundle(root, model=model, known_inputs=[{"x": _X}])


def _loop() -> NodeProto:
    """y = x, after `count` iterations."""
    node, info = helper.make_node, helper.make_tensor_value_info
    body = helper.make_graph(
        [node("Identity", ["go_on"], ["continues"]), node("Identity", ["value"], ["next"])],
        "body",
        [
            info("i", TensorProto.INT64, []),
            info("go_on", TensorProto.BOOL, []),
            info("value", TensorProto.FLOAT, None),
        ],
        [info("continues", TensorProto.BOOL, []), info("next", TensorProto.FLOAT, None)],
    )
    return node("Loop", ["count", "always", "x"], ["y"], body=body)


def hanging_when_opened(root: Path, *, name: str = "tensors", version: str = "1") -> Path:
    """A thousand products of large constants, which the optimiser computes when a session opens."""
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
    """A normal distribution with scale 0, on which ONNX Runtime aborts the process."""
    node = helper.make_node
    nodes = [
        node("RandomNormalLike", ["x"], ["noise"], scale=0.0),
        node("Add", ["x", "noise"], ["y"]),
    ]
    return _bundle(root, nodes, {})


def harmless(root: Path, *, name: str = "tensors", version: str = "1") -> Path:
    """A bundle with the same tensors as the others, and a harmless model."""
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
    return write_certified(
        root,
        onnx_model(nodes, inputs=[x], outputs=[y], weights=weights),
        # A session of the model itself would hang or abort here. This one has the same tensors.
        open_session(onnx_model(identity, inputs=[x], outputs=[y])),
        (KnownAnswer(inputs={"x": _X}, outputs={"y": _X}),),
        lambda certificate: certificate,
        name=name,
        version=version,
    )
