"""Small graphs for the tests of the proof, and a small exact network that is written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]

OPSET = 20
VOCABULARY, WIDTH, LABELS, LENGTH = 32, 8, 3, 6


def model(
    nodes: Sequence[onnx.NodeProto],
    *,
    inputs: Mapping[str, tuple[int, Sequence[int | str]]],
    constants: Mapping[str, Any] | None = None,
    outputs: Sequence[str] = ("y",),
    opset: int = OPSET,
    **extra: Any,
) -> onnx.ModelProto:
    """A model; each input is its element type and its shape."""
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [
            numpy_helper.from_array(np.asarray(array), name)
            for name, array in (constants or {}).items()
        ],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9, **extra
    )


def node(op: str, inputs: Sequence[str], output: str = "y", **attributes: Any) -> onnx.NodeProto:
    """A node that is named after its output."""
    return helper.make_node(op, list(inputs), [output], name=f"at_{output}", **attributes)


class ExactNetwork:
    """ids (batch, length) -> logits (batch, LABELS): embedding, a layer, attention, mean, head.

    Each array may be replaced before `model` is called.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(0)

        def integers(limit: int, *shape: int) -> Array:
            return rng.integers(-limit, limit + 1, shape).astype(np.float32)

        gaps = np.floor(255 * np.exp(-np.arange(64) / 16)).astype(np.float32)
        totals = np.arange(LENGTH * 255 + 1)
        self.arrays: dict[str, Array] = {
            "table": integers(127, VOCABULARY, WIDTH) * np.float32(2.0**-5),
            "up": integers(31, WIDTH, 2 * WIDTH) * np.float32(2.0**-4),
            "up_bias": integers(63, 2 * WIDTH) * np.float32(0.25) + np.float32(0.125),
            "down": integers(31, 2 * WIDTH, WIDTH) * np.float32(2.0**-6),
            "gaps": gaps,
            "shares": np.floor(2.0**16 / np.maximum(totals, 1)).astype(np.float32),
            "head": integers(63, WIDTH, LABELS) * np.float32(2.0**-7),
            "head_bias": integers(63, LABELS) * np.float32(0.5) + np.float32(0.25),
            "scale": np.float32(2.0**-13),
            "mean": np.float32(2.0**-12),
            "zero": np.float32(0),
            "top": np.float32(127),
            "bottom": np.float32(-127),
            "last_gap": np.float32(63),
            "last": np.asarray([-1], np.int64),
            "positions": np.asarray([1], np.int64),
        }
        self.nodes = [
            node("Gather", ["table", "ids"], "embedded"),
            node("MatMul", ["embedded", "up"], "raised"),
            node("Add", ["raised", "up_bias"], "shifted"),
            node("Floor", ["shifted"], "whole"),
            node("Clip", ["whole", "zero", "top"], "hidden"),
            node("MatMul", ["hidden", "down"], "lowered"),
            node("Floor", ["lowered"], "floored"),
            node("Clip", ["floored", "bottom", "top"], "x"),
            node("Transpose", ["x"], "keys", perm=[0, 2, 1]),
            node("MatMul", ["x", "keys"], "scores"),
            node("ReduceMax", ["scores", "last"], "best", keepdims=1),
            node("Sub", ["best", "scores"], "gap"),
            node("Clip", ["gap", "zero", "last_gap"], "near"),
            node("Cast", ["near"], "index", to=TensorProto.INT32),
            node("Gather", ["gaps", "index"], "weight"),
            node("ReduceSum", ["weight", "last"], "total", keepdims=1),
            node("Cast", ["total"], "total_index", to=TensorProto.INT32),
            node("Gather", ["shares", "total_index"], "share"),
            node("Mul", ["weight", "share"], "product"),
            node("Mul", ["product", "scale"], "small"),
            node("Floor", ["small"], "attention"),
            node("MatMul", ["attention", "x"], "mixed"),
            node("ReduceSum", ["mixed", "positions"], "pooled", keepdims=0),
            node("Mul", ["pooled", "mean"], "shrunk"),
            node("Floor", ["shrunk"], "averaged"),
            node("MatMul", ["averaged", "head"], "answers"),
            node("Add", ["answers", "head_bias"], "logits"),
        ]

    def node_named(self, output: str) -> onnx.NodeProto:
        return next(item for item in self.nodes if item.output[0] == output)

    def model(self) -> onnx.ModelProto:
        return model(
            self.nodes,
            inputs={"ids": (TensorProto.INT64, ["batch", "length"])},
            constants=self.arrays,
            outputs=["logits"],
        )
