"""Sums of table rows as products of bytes: the bits of the float sums; what does not qualify."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from evalmode.export.exact.integer_kernels import with_integer_kernels
from evalmode.export.exact.statements import Limits, statements_of
from evalmode.export.graph import graph_of
from tests.export.exact.small_exact_graphs import Array, model, node
from tests.export.exact.test_integer_kernels import answers_of
from tests.export.test_exact_network import LEVELS

LIMITS = Limits(ranges={"ids": (0, 49)}, largest={"length": 7})


def sum_of_rows(
    table: Array, *, count: int = 16, axis: int = 2, keepdims: int = 0, other: bool = False
) -> onnx.ModelProto:
    """The sum of `count` rows of a table; `other` says whether something else reads the table."""
    nodes = [
        node("Gather", ["table", "ids"], "rows"),
        node("ReduceSum", ["rows", "axes"], "sums", keepdims=keepdims),
        node("Add", ["sums", "first" if other else "zero"]),
    ]
    if other:
        nodes.insert(0, node("Gather", ["table", "place"], "first"))
    return model(
        nodes,
        inputs={"ids": (onnx.TensorProto.INT64, ["batch", "length", count])},
        constants={
            "table": table,
            "axes": np.array([axis], np.int64),
            "zero": np.float32(0),
            "place": np.int64(3),
        },
    )


def table_of(unit: float, largest: int = 127) -> Array:
    table = np.random.default_rng(0).integers(-largest, largest + 1, (50, 8)).astype(np.float32)
    table[7] = largest
    return np.asarray(table * np.float32(unit))


@pytest.mark.parametrize("unit", [1, 2, 32, 128])
@pytest.mark.parametrize("count", [1, 16])
def test_a_sum_of_rows_has_the_bits_of_the_float_sum_and_is_proved(unit: int, count: int) -> None:
    graph = sum_of_rows(table_of(unit), count=count)
    integer = with_integer_kernels(graph, LIMITS)
    assert [item.op_type for item in integer.graph.node] == [
        *("Gather", "MatMulInteger", "Squeeze", "Cast"),
        "Add",
    ]
    stored = {item.name: numpy_helper.to_array(item) for item in integer.graph.initializer}
    assert [array.dtype for array in stored.values() if array.shape == (50, 8)] == [np.int8]

    exact, saturation = statements_of(graph_of(integer), LIMITS)
    assert exact.why == "proved"
    # Two products of the largest unit and the largest integer are 32,512, which 16 bits hold.
    assert saturation.holds
    draw = torch.Generator().manual_seed(0)
    inputs = [
        {"ids": torch.randint(0, 50, (rows, length, count), generator=draw)}
        for rows, length in [(1, 1), (3, 7), (32, 4)]
    ]
    inputs.append({"ids": torch.full((1, 2, count), 7)})  # the largest sum
    for level in LEVELS:
        assert answers_of(integer, inputs, level) == answers_of(graph, inputs, level)


@pytest.mark.parametrize(
    "changes",
    [
        {"table": table_of(0.5)},
        {"table": table_of(256)},
        {"table": table_of(1, largest=128)},
        {"table": table_of(1), "axis": 1},
        {"table": table_of(1), "keepdims": 1},
        {"table": table_of(1), "other": True},
    ],
    ids=["a fraction", "a unit beyond a byte", "9 bits", "axis", "keepdims", "other"],
)
def test_a_sum_that_does_not_qualify_stays_as_it_is(changes: dict[str, Any]) -> None:
    graph = sum_of_rows(**changes)
    integer = with_integer_kernels(graph, LIMITS)
    assert list(integer.graph.node) == list(graph.graph.node)
    assert graph.graph.initializer[0].name == "table"
    assert integer.graph.initializer[0] == graph.graph.initializer[0]
