"""A sum of table rows as a product of bytes: the embedding of an exact graph with integer kernels.

    float       ReduceSum(Gather(table, ids), axis -2)      ids (..., G), table (V, D) -> (..., D)
    integer     rows = Gather(integers, ids)                int8 (..., G, D)
                Cast(Squeeze(MatMulInteger(units, rows)))   units (1, G) uint8, all the same

A table qualifies if it holds integers of 8 bits times one power of two, the unit. The lookup then
reads a quarter of the memory. The product with units is faster than a cast of all rows and a sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from evalmode.export.exact.call import Call
from evalmode.export.exact.values import FLOAT32, NotExact

_LARGEST_INTEGER = 127
# A float32 holds every integer up to this one.
_LARGEST = 2**24
# The exponents of units that a byte holds.
_UNIT_EXPONENTS = range(8)


@dataclass(frozen=True, eq=False, kw_only=True)
class IntegerTable:
    """A table of bytes, and the lookup of it whose rows are summed up.

    lookup      the Gather
    integers    (V, D) int8
    unit        what 1 in the table is worth: a power of two up to 128
    count       G, how many rows are summed up
    """

    lookup: NodeProto
    integers: npt.NDArray[np.int8]
    unit: int
    count: int


def integer_table(call: Call, calls: Mapping[str, Call], graph: GraphProto) -> IntegerTable | None:
    """The table of bytes for a ReduceSum of rows; None if it does not qualify.

    `calls` are all nodes that the proof followed, by the name of their first output.
    """
    if call.op != "ReduceSum" or call.at.domain:
        return None
    lookup = calls.get(call.at.node.input[0])
    if lookup is None or lookup.op != "Gather" or lookup.at.domain:
        return None
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    if readers[lookup.at.node.output[0]] > 1 or readers[lookup.at.node.input[0]] > 1:
        return None
    try:
        table, shape = lookup.input(0), call.shape(0)
        if table.array is None or table.array.ndim != 2 or table.dtype != FLOAT32:
            return None
        if lookup.axis("axis", 0, 2) != 0 or call.attribute("keepdims", 1):
            return None
        if call.axes(len(shape)) != [len(shape) - 2]:
            return None
        exponent, largest = int(table.bounds.grid.min()), float(table.bounds.largest.max())
    except NotExact:
        return None
    count = shape[-2].exact
    if not count or exponent not in _UNIT_EXPONENTS:
        return None
    unit = 2**exponent
    if largest > _LARGEST_INTEGER * unit or count * largest > _LARGEST:
        return None
    # Exact: the table holds multiples of a power of two.
    integers = (np.asarray(table.array, np.float32) / np.float32(unit)).astype(np.int8)
    return IntegerTable(lookup=lookup.at.node, integers=integers, unit=unit, count=count)


def written_table(
    node: NodeProto, table: IntegerTable
) -> tuple[list[NodeProto], list[TensorProto]]:
    """The nodes in the place of a lookup and the sum `node`, and the tensors that they read."""
    output = node.output[0]
    integers, units, axis = (f"{output}_{part}" for part in ("integers", "units", "axis"))
    rows, sums, squeezed = (f"{output}_{part}" for part in ("rows", "sums", "squeezed"))
    nodes = [
        helper.make_node("Gather", [integers, table.lookup.input[1]], [rows], axis=0),
        helper.make_node("MatMulInteger", [units, rows], [sums]),
        helper.make_node("Squeeze", [sums, axis], [squeezed]),
        helper.make_node("Cast", [squeezed], [output], to=TensorProto.FLOAT),
    ]
    for index, new_node in enumerate(nodes):
        new_node.name = f"{node.name}/{new_node.op_type}_{index}"
    return nodes, [
        numpy_helper.from_array(table.integers, integers),
        numpy_helper.from_array(np.full((1, table.count), table.unit, np.uint8), units),
        numpy_helper.from_array(np.array([-2], np.int64), axis),
    ]
