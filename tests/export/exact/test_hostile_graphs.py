"""Graphs that are written to get a wrong proof.

Each is refused with the name of a node, or every setting of ONNX Runtime agrees with the proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from evalmode.bundle.comparison import OTHER_ROUNDINGS, rounding_mode
from evalmode.export.exact.limits import FloatRange, Range
from evalmode.export.exact.prove import Proof, prove
from evalmode.export.graph import graph_of
from tests.export.exact.small_exact_graphs import Array, model, node

FLOAT, INT64, INT32, INT8 = (
    TensorProto.FLOAT,
    TensorProto.INT64,
    TensorProto.INT32,
    TensorProto.INT8,
)
F32 = np.float32
# From -5 to 6; the proofs are for -8 to 12.
IDS = np.arange(12).reshape(3, 4) - 5
CAST = node("Cast", ["ids"], "x", to=FLOAT)


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Nodes from "ids" (n, 4) to "y"; with `numbers` also from the float input "numbers"."""

    nodes: Sequence[onnx.NodeProto]
    constants: dict[str, Any] = field(default_factory=dict)
    numbers: Array | None = None
    numbers_range: FloatRange | None = None
    opset: int = 18

    def model(self) -> onnx.ModelProto:
        inputs: dict[str, tuple[int, Sequence[int | str]]] = {"ids": (INT64, ["n", 4])}
        if self.numbers is not None:
            inputs["numbers"] = (FLOAT, self.numbers.shape)
        return model(self.nodes, inputs=inputs, constants=self.constants, opset=self.opset)

    def proof(self) -> Proof:
        ranges: dict[str, Range] = {"ids": (-8, 12)}
        if self.numbers_range is not None:
            ranges["numbers"] = self.numbers_range
        return prove(graph_of(self.model()), ranges=ranges, largest={"n": 3})


REFUSED: dict[str, tuple[Graph, str]] = {
    "infinity as one of two numbers": (
        Graph(
            nodes=[CAST, node("Greater", ["x", "c"], "b"), node("Where", ["b", "x", "inf"])],
            constants={"c": F32(0), "inf": F32(np.inf)},
        ),
        "a NaN or an infinity",
    ),
    "a NaN that a maximum might drop": (
        Graph(nodes=[CAST, node("Max", ["x", "nan"])], constants={"nan": F32(np.nan)}),
        "a NaN or an infinity",
    ),
    "a mean of no numbers": (
        Graph(
            nodes=[
                CAST,
                node("Slice", ["x", "start", "end", "axes"], "none"),
                node("ReduceMean", ["none", "axes"]),
            ],
            constants={"start": [4], "end": [9], "axes": [1]},
        ),
        "it divides by 0 numbers",
    ),
    "an index beyond the table": (
        Graph(nodes=[node("Gather", ["table", "ids"])], constants={"table": np.ones(12, F32)}),
        "its indices go from -8 to 12",
    ),
    "an int8 that has no magnitude": (
        Graph(
            nodes=[
                node("Sub", ["ids", "c"], "low"),
                node("Cast", ["low"], "bytes", to=INT8),
                node("Abs", ["bytes"], "magnitude"),
                node("Cast", ["magnitude"], to=FLOAT),
            ],
            constants={"c": np.int64(120)},
        ),
        "may overflow int8",
    ),
    "a product beyond int64": (
        Graph(
            nodes=[node("Mul", ["ids", "c"], "wide"), node("Cast", ["wide"], to=FLOAT)],
            constants={"c": np.int64(2**62)},
        ),
        "may overflow int64",
    ),
    "a cast that wraps": (
        Graph(
            nodes=[
                node("Cast", ["ids"], "bytes", to=TensorProto.UINT8),
                node("Cast", ["bytes"], to=FLOAT),
            ]
        ),
        "do not all fit uint8",
    ),
    "four bits": (
        Graph(
            nodes=[node("Cast", ["ids"], "i", to=TensorProto.INT4), node("Cast", ["i"], to=FLOAT)],
            opset=21,
        ),
        "it casts to int4",
    ),
    "1 / -0.0": (
        Graph(
            nodes=[
                node("Neg", ["numbers"], "n"),
                node("Reciprocal", ["n"], "r"),
                node("Clip", ["r", "low", "high"]),
            ],
            constants={"low": F32(-1), "high": F32(1)},
            numbers=F32([0, 1]),
            numbers_range=FloatRange(low=0, high=1, grid=0),
        ),
        "its results round",
    ),
    "a -0.0 that is left out of a sum": (
        Graph(
            nodes=[node("Add", ["numbers", "zero"])],
            constants={"zero": F32(0)},
            numbers=F32([-0.0, 1]),
            numbers_range=FloatRange(low=0, high=1, grid=0),
        ),
        "it may be -0.0",
    ),
    "scattered duplicates": (
        Graph(
            nodes=[CAST, node("ScatterElements", ["x", "at", "x"], reduction="add", axis=1)],
            constants={"at": np.zeros((3, 4), np.int64)},
        ),
        "does not follow this operator",
    ),
    "two weights of a product whose activations are quantised": (
        Graph(
            nodes=[
                CAST,
                node("DequantizeLinear", ["w", "scale"], "matrix"),
                node("MatMul", ["x", "matrix"]),
            ],
            constants={"w": np.ones((4, 2), np.int8), "scale": F32(0.5)},
        ),
        "runtimes quantise anew",
    ),
    "a column whose sum is 25 bits": (
        Graph(
            nodes=[CAST, node("MatMul", ["x", "w"])],
            constants={"w": np.full((4, 2), 2.0**19 + 1, F32)},
        ),
        "may need 24.6 bits",
    ),
}


@pytest.mark.parametrize("attack", REFUSED)
def test_it_is_refused(attack: str) -> None:
    graph, why = REFUSED[attack]
    proof = graph.proof()
    assert not proof.proved
    assert why in str(proof)
    assert proof.reasons[0].node


def _function_model() -> onnx.ModelProto:
    """A function whose attribute is given by the call, and left to the operator's default."""
    body = helper.make_node("ReduceMax", ["a", "axes"], ["b"], name="inner")
    for name in ("keepdims", "noop_with_empty_axes"):
        attribute = body.attribute.add()
        attribute.name, attribute.ref_attr_name = name, f"{name}_of_call"
        attribute.type = onnx.AttributeProto.INT
    function = helper.make_function(
        "mine",
        "Best",
        ["a", "axes"],
        ["b"],
        [body],
        [helper.make_opsetid("", 18)],
        ["keepdims_of_call", "noop_with_empty_axes_of_call"],
    )
    proto = model(
        [CAST, node("Best", ["x", "axes"], domain="mine", keepdims_of_call=0)],
        inputs={"ids": (INT64, ["n", 4])},
        constants={"axes": [1]},
        opset=18,
        functions=[function],
    )
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    return proto


_rng = np.random.default_rng(0)
_KERNEL = _rng.integers(-20, 21, (32, 16, 1, 1)).astype(F32)
_IMAGES = _rng.integers(0, 256, (2, 16, 12, 12)).astype(F32)
_ZEROS = np.where(_rng.random((3, 4)) < 0.5, F32(-0.0), F32(0.0))
_BIT = FloatRange(low=0, high=1, grid=0)

PROVED: dict[str, Graph] = {
    "a Slice backwards to the very first": Graph(
        nodes=[CAST, node("Slice", ["x", "start", "end", "axes", "steps"])],
        constants={"start": [-1], "end": [-(2**63)], "axes": [1], "steps": [-2]},
    ),
    "sums from the end that leave out their own number": Graph(
        nodes=[CAST, node("CumSum", ["x", "axis"], reverse=1, exclusive=1)],
        constants={"axis": np.int64(-1)},
    ),
    "a reduction without axes": Graph(
        nodes=[CAST, node("ReduceSum", ["x", "axes"], noop_with_empty_axes=1)],
        constants={"axes": np.zeros(0, np.int64)},
    ),
    "a table that is repeated no times": Graph(
        nodes=[CAST, node("Tile", ["x", "repeats"], "none"), node("ReduceSum", ["none", "axes"])],
        constants={"repeats": [1, 0], "axes": [1]},
    ),
    "limits that take turns": Graph(
        nodes=[
            CAST,
            node("Clip", ["x", "a", "b"], "first"),
            node("Clip", ["first", "c", "d"]),
        ],
        constants={"a": F32(-3), "b": F32(1), "c": F32(2), "d": F32(5)},
    ),
    "bytes less their zero points": Graph(
        nodes=[
            node("Cast", ["ids"], "bytes", to=INT8),
            node("MatMulInteger", ["bytes", "w", "zero", "zeros"], "sums"),
            node("Cast", ["sums"], to=FLOAT),
        ],
        constants={
            "w": np.arange(-8, 8).reshape(4, 4).astype(np.int8),
            "zero": np.int8(-120),
            "zeros": np.int8([1, -2, 3, 127]),
        },
    ),
    "weights that a runtime folds a scale and a bias into": Graph(
        nodes=[
            node("Conv", ["numbers", "kernel"], "sums"),
            node("Mul", ["sums", "scale"], "scaled"),
            node("Add", ["scaled", "bias"], "shifted"),
            node("Relu", ["shifted"]),
        ],
        constants={
            "kernel": _KERNEL,
            "scale": _rng.integers(1, 9, (32, 1, 1)).astype(F32),
            "bias": _rng.integers(-9, 9, (32, 1, 1)).astype(F32) + F32(0.25),
        },
        numbers=_IMAGES,
        numbers_range=FloatRange(low=0, high=255, grid=0),
    ),
    "the index of the largest zero": Graph(
        nodes=[
            node("Relu", ["numbers"], "zeros"),
            node("ArgMax", ["zeros"], "index", axis=1),
            node("Cast", ["index"], to=FLOAT),
        ],
        numbers=_ZEROS,
        numbers_range=_BIT,
    ),
    "a truth that is -0.0": Graph(
        nodes=[
            node("Cast", ["numbers"], "truth", to=TensorProto.BOOL),
            node("Where", ["truth", "a", "b"]),
        ],
        constants={"a": F32(3), "b": F32(5)},
        numbers=_ZEROS,
        numbers_range=_BIT,
    ),
    "a zero of either sign that becomes an integer": Graph(
        nodes=[node("Cast", ["numbers"], "i", to=INT32), node("Cast", ["i"], to=FLOAT)],
        numbers=_ZEROS,
        numbers_range=_BIT,
    ),
}


def require_agreement(proto: onnx.ModelProto, proof: Proof, feed: dict[str, Array]) -> None:
    """Assert that all settings of ONNX Runtime give the same bits, within the proof's bounds."""
    bounds = proof.tensors["y"].bounds
    answers = set()
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"):
        for threads in (1, 2):
            options = ort.SessionOptions()
            options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
            options.intra_op_num_threads = threads
            options.add_session_config_entry("session.x64quantprecision", "1")
            session = ort.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            (answer,) = session.run(["y"], feed)
            answers.add(answer.tobytes())
            if threads == 1:
                for mode in OTHER_ROUNDINGS:
                    with rounding_mode(mode):
                        (other,) = session.run(["y"], feed)
                    assert np.array_equal(other, answer)
            if answer.size:
                assert bounds.low.min() <= answer.min()
                assert answer.max() <= bounds.high.max()
            shape = proof.tensors["y"].shape or ()
            for extent, size in zip(shape, answer.shape, strict=True):
                assert extent.lowest <= size
                assert extent.largest is None or size <= extent.largest
    assert len(answers) == 1


@pytest.mark.parametrize("attack", PROVED)
def test_it_is_proved_and_the_runtime_agrees(attack: str) -> None:
    graph = PROVED[attack]
    proof = graph.proof()
    assert proof.proved, str(proof)
    feed: dict[str, Array] = {"ids": IDS}
    if graph.numbers is not None:
        feed["numbers"] = graph.numbers
    require_agreement(graph.model(), proof, feed)


def test_an_attribute_of_a_call_reaches_the_body_of_a_function() -> None:
    proto = _function_model()
    proof = prove(graph_of(proto), ranges={"ids": (-8, 12)}, largest={"n": 3})
    assert proof.proved, str(proof)
    assert len(proof.tensors["y"].shape or ()) == 1
    require_agreement(proto, proof, {"ids": IDS})
