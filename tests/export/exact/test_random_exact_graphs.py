"""No random graph is proved wrongly: against rational numbers, other orders, and two runtimes.

Set EXACT_GRAPHS to run more of them than the suite does.
"""

from __future__ import annotations

import os
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from evalmode.bundle.comparison import OTHER_ROUNDINGS, rounding_mode
from evalmode.export.exact.limits import Range
from evalmode.export.exact.prove import Proof, prove
from evalmode.export.exact.values import Bounds
from evalmode.export.graph import graph_of
from tests.export.exact.random_exact_graphs import (
    VOCABULARY,
    RandomGraph,
    float32_of,
    fractions_of,
    inputs_of,
    model_of,
    names_read_by_branches,
    random_graph,
)

COUNT = int(os.environ.get("EXACT_GRAPHS", "2000"))
PARTS = 4
# ONNX Runtime computes these in the rounding direction of the processor.
DIRECTED = {"Round"}


def require_within(bounds: Bounds, exact: np.ndarray[Any, Any], name: str) -> None:
    """Assert that exact numbers are on their grid, within their bounds, and float32 numbers."""
    channels = exact.shape[-1] if exact.ndim else 1
    columns = exact.reshape(-1, channels)
    for channel in range(channels):
        at = channel if bounds.channels else ()
        low, high = Fraction(float(bounds.low[at])), Fraction(float(bounds.high[at]))
        step = Fraction(2) ** int(bounds.grid[at])
        for value in columns[:, channel]:
            assert low <= value <= high, f"{name}: {value} is outside {low} to {high}"
            assert (value / step).denominator == 1, f"{name}: {value} is not on the grid {step}"
            assert Fraction(float(np.float32(float(value)))) == value, f"{name}: {value} rounds"


def without_other_outputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the nodes that its output does not need.

    ONNX Runtime 1.31 refuses some with a DequantizeLinear behind a product of bytes: it makes a
    MatMulIntegerToFloat of int32 numbers.
    """
    needed = {model.graph.output[0].name}
    nodes = []
    for node in reversed(model.graph.node):
        if node.output[0] in needed:
            nodes.insert(0, node)
            needed |= {*node.input, *names_read_by_branches(node)}
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def open_session(model: onnx.ModelProto, level: Any) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    # Without it, products of bytes saturate on processors without VNNI.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def check(graph: RandomGraph, rng: np.random.Generator) -> Proof:
    """Compare everything that the proof knows of a graph with what it computes on some ids."""
    model = model_of(graph)
    ranges: dict[str, Range] = {"ids": (0, VOCABULARY - 1)}
    if graph.numbers_range is not None:
        ranges["numbers"] = graph.numbers_range
    proof = prove(graph_of(model), ranges=ranges)
    output = model.graph.output[0].name
    sessions = []
    if proof.proved:
        model = without_other_outputs(model)
        reference = ReferenceEvaluator(model)
        sessions = [
            open_session(model, level)
            for level in (
                ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
                ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
            )
        ]
    for _ in range(2):
        inputs = inputs_of(graph, rng)
        exact = fractions_of(graph, inputs)
        for name, tensor in proof.tensors.items():
            if tensor.computed is not None and name in exact and exact[name].dtype == object:
                require_within(tensor.bounds, exact[name], name)
        if not proof.proved:
            continue
        answers = {float32_of(graph, inputs, rng)[output].tobytes() for _ in range(4)}
        results = [session.run(None, inputs)[0] for session in sessions]
        answers |= {result.tobytes() for result in results}
        answers.add(np.ascontiguousarray(reference.run(None, inputs)[0]).tobytes())
        assert len(answers) == 1, "a proved graph has different bits in another order"
        if not DIRECTED & {node.op_type for node in graph.nodes}:
            for session in sessions:
                require_same_numbers_in_every_direction(
                    session, inputs, results[0], can_be_zero=proof.tensors[output].bounds.has_zero
                )
    return proof


def require_same_numbers_in_every_direction(
    session: ort.InferenceSession,
    inputs: dict[str, np.ndarray[Any, Any]],
    expected: np.ndarray[Any, Any],
    *,
    can_be_zero: bool,
) -> None:
    """Assert that the rounding direction changes no number, and no bit of what is never zero."""
    for mode in OTHER_ROUNDINGS:
        with rounding_mode(mode):
            (result,) = session.run(None, inputs)
        assert np.array_equal(result, expected), f"rounding {mode} gives other numbers"
        if not can_be_zero:
            assert result.tobytes() == expected.tobytes(), f"rounding {mode} gives other bits"


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.timeout(3600)
def test_no_random_graph_is_proved_wrongly(part: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(part)
    counts = Counter[bool]()
    with np.errstate(all="ignore"):
        for number in range(COUNT // PARTS):
            graph = random_graph(rng)
            try:
                counts[check(graph, rng).proved] += 1
            except AssertionError as error:
                path = tmp_path / "wrong.onnx"
                onnx.save(model_of(graph), path)
                raise AssertionError(f"graph {number} of part {part}: {path}") from error
    # Both kinds must be there, or the test would say little.
    assert min(counts[True], counts[False]) > COUNT // PARTS // 10, counts
