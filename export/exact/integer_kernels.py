"""An exact graph with products of bytes in the place of float products, and with the same bits.

A product qualifies if its left operand holds integers from -128 to 127 or from 0 to 255, which the
proof shows, and if its weights are integers of 8 bits times a power of two for each column:

    float       Gemm(a, weights, bias)
    integer     u = Cast(a + 128)                                uint8; without the 128 from 0 on
                y = Cast(MatMulInteger(u, integers)) * (one * scale)
                y + (bias - 128 * the column's sum of weights)

`scale` has a power of two for each column. Unsigned activations and signed weights are what x86
processors multiply fastest. Those without VNNI saturate on weights of 8 bits: see `saturation`.

`one` is 1.0, computed in the run: the smaller of 1 and the number of rows. ONNX Runtime makes one
operation of the product, the cast, the scale and the bias, if the scale is itself a product of two
numbers that are not both stored. Dynamic quantisation writes it so: one of them depends on the
activations. With a stored scale there are four operations (1.31).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from evalmode.export.exact.call import Call
from evalmode.export.exact.integer_tables import IntegerTable, integer_table, written_table
from evalmode.export.exact.limits import Limits
from evalmode.export.exact.prove import prove
from evalmode.export.exact.values import FLOAT32, NotExact, significands
from evalmode.export.graph import graph_of

# A float32 holds every integer up to this one.
_LARGEST = 2**24
_LARGEST_WEIGHT = 127
_LARGEST_BYTE = 255
# What makes a signed byte unsigned.
_OFFSET = 128
# A Gemm with these is a product and an addition; its weights may be transposed.
_GEMM_DEFAULTS = {"alpha": 1.0, "beta": 1.0, "transA": 0}


@dataclass(frozen=True, eq=False, kw_only=True)
class IntegerProduct:
    """A product of bytes that gives the sums of a float product.

    integers    (K, N) int8
    scale       (N,) float32, the power of two of each column
    bias        (N,) float32, the float product's less what the offset adds to the sums
    offset      what is added to the left operand: 0 or 128
    """

    integers: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    offset: int


# Standard operators that pass numbers on and compute none.
_MOVES = ("Reshape", "Transpose")


def with_integer_kernels(model: ModelProto, limits: Limits) -> ModelProto:
    """A copy of an exact model, in which every product that qualifies is a MatMulInteger.

    `limits` are those of the proof. Other products stay as they are. A sum of rows of a table is
    one of them: see `integer_tables`.

    Example:
        limits = Limits(ranges={"input_ids": (0, 65535)}, largest={"length": 32})
        integer = with_integer_kernels(onnx.load(path), limits)
    """
    before = graph_of(model)
    limits = limits.within(before)
    proof = prove(before, ranges=limits.ranges, largest=limits.largest)
    calls = {call.at.node.output[0]: call for call in proof.calls}
    products: dict[str, IntegerProduct] = {}
    floors: dict[str, str] = {}
    tables: dict[str, IntegerTable] = {}
    lookups: set[str] = set()
    for name, call in calls.items():
        table = integer_table(call, calls, model.graph)
        if table is not None:
            tables[name] = table
            lookups.add(table.lookup.output[0])
        qualified = integer_product(call)
        if qualified is not None:
            products[name] = qualified
            floor = _redundant_floor(call.at.node.input[0], qualified, calls, model.graph)
            if floor is not None:
                floors[floor.output[0]] = floor.input[0]

    rewritten = ModelProto()
    rewritten.CopyFrom(model)
    graph = rewritten.graph
    # These would be the shapes and the types of values that are gone.
    del graph.value_info[:]
    one, nodes = _one_of_the_run(graph) if products else ("", [])
    for node in graph.node:
        output = node.output[0]
        if output in floors or output in lookups:
            continue
        if output in products:
            new_nodes, new_tensors = _written(node, products[output], one)
        elif output in tables:
            new_nodes, new_tensors = written_table(node, tables[output])
        else:
            new_nodes, new_tensors = [node], []
            if node.input and node.input[0] in floors:
                node.input[0] = floors[node.input[0]]
        nodes += new_nodes
        graph.initializer.extend(new_tensors)
    del graph.node[:]
    graph.node.extend(nodes)

    # The float weights and the float tables that nothing reads any more.
    names = {name for node in graph.node for name in node.input}
    names |= {value.name for value in graph.output}
    tensors = [tensor for tensor in graph.initializer if tensor.name in names]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
    return rewritten


def integer_product(call: Call) -> IntegerProduct | None:
    """The product of bytes for a MatMul or a Gemm with stored weights; None if it does not qualify.

    All sums of the new nodes must fit 24 bits too, those before the bias included.
    """
    if call.op not in ("MatMul", "Gemm") or call.at.domain:
        return None
    try:
        weights, left = call.input(1).array, call.bounds(0).together()
        bias = call.input(2).array if call.has(2) else None
    except NotExact:
        return None
    if weights is None or weights.ndim != 2 or weights.dtype != FLOAT32:
        return None
    if call.op == "Gemm":
        options = [call.attribute(name, default) for name, default in _GEMM_DEFAULTS.items()]
        if options != list(_GEMM_DEFAULTS.values()) or (call.has(2) and bias is None):
            return None
        if call.attribute("transB", 0):
            weights = weights.T
    columns = weights.shape[1]
    if bias is None:
        bias = np.zeros(columns, np.float32)
    if bias.shape != (columns,) or int(left.grid) < 0:
        return None

    low, high = float(left.low), float(left.high)
    if low >= 0 and high <= _LARGEST_BYTE:
        offset = 0
    elif low >= -_OFFSET and high < _OFFSET:
        offset = _OFFSET
    else:
        return None

    # The lowest bit of a column's weights is its scale.
    lowest_bits, _ = significands(np.ascontiguousarray(weights, np.float32))
    is_used = weights != 0
    exponents = np.where(is_used, lowest_bits, np.iinfo(np.int64).max).min(axis=0)
    exponents = np.where(is_used.any(axis=0), exponents, 0)
    scale = np.ldexp(1.0, exponents.astype(np.int32))
    integers = weights.astype(np.float64) / scale
    if np.abs(integers).max(initial=0) > _LARGEST_WEIGHT:
        return None

    exact_bias = bias - offset * integers.sum(axis=0) * scale
    new_bias = exact_bias.astype(np.float32) + np.float32(0)  # no -0.0
    if (new_bias != exact_bias).any():
        return None
    sums = np.abs(integers).sum(axis=0) * _LARGEST_BYTE
    grid = np.minimum(scale, np.ldexp(1.0, _grid_of(new_bias)))
    if (sums > _LARGEST).any() or ((sums * scale + np.abs(exact_bias)) / grid > _LARGEST).any():
        return None
    return IntegerProduct(
        integers=integers.astype(np.int8),
        scale=scale.astype(np.float32),
        bias=new_bias,
        offset=offset,
    )


def _grid_of(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """The exponent of the lowest bit of each number; that of 1.0 for a zero."""
    lowest_bits, _ = significands(numbers)
    return np.where(numbers != 0, lowest_bits, 0).astype(np.int32)


def _redundant_floor(
    left: str, product: IntegerProduct, calls: Mapping[str, Call], graph: GraphProto
) -> NodeProto | None:
    """The Floor whose work is done by the cast of a product's left operand; None if there is none.

        left = moved(Clip(Floor(x), low, high))     low and high are integers
        u = Cast(left + offset)

    A cast to integers drops the fraction. The operand is not negative there, so that is a floor.
    Neither integer limits nor an integer offset change what a floor drops.
    """
    producers = {name: node for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)

    def alone(name: str, *ops: str) -> NodeProto | None:
        """The node that computes a tensor which nothing else reads, if it is one of these."""
        node = producers.get(name)
        if node is None or readers[name] > 1 or name not in calls:
            return None
        return node if calls[name].op in ops and not calls[name].at.domain else None

    while (move := alone(left, *_MOVES)) is not None:
        left = move.input[0]
    clip = alone(left, "Clip")
    floor = alone(clip.input[0], "Floor") if clip is not None else None
    if clip is None or floor is None:
        return None
    limits = [calls[left].input(index).array for index in (1, 2) if calls[left].has(index)]
    if len(limits) < 2 or any(limit is None or limit != np.floor(limit) for limit in limits):
        return None
    low, high = (float(limit) + product.offset for limit in limits if limit is not None)
    # The sum with the offset has the fraction now, and must still fit 24 bits.
    finest = 2.0 ** int(calls[floor.output[0]].bounds(0).grid.min())
    return floor if low >= 0 and high <= min(_LARGEST_BYTE, _LARGEST * finest) else None


def _one_of_the_run(graph: GraphProto) -> tuple[str, list[NodeProto]]:
    """The name of 1.0 as a tensor that the file does not store, and the nodes that compute it.

    Each axis of an input has at least one element, which the proof assumes too.
    """
    name, size = "one_of_the_run", "one_of_the_run_size"
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), f"{name}_limit"))
    return name, [
        helper.make_node("Shape", [graph.input[0].name], [size], name=size, start=0, end=1),
        helper.make_node("Min", [size, f"{name}_limit"], [f"{name}_int64"], name=f"{name}_int64"),
        helper.make_node("Cast", [f"{name}_int64"], [name], name=name, to=TensorProto.FLOAT),
    ]


def _written(
    node: NodeProto, product: IntegerProduct, one: str
) -> tuple[list[NodeProto], list[TensorProto]]:
    """The nodes in the place of a float product, and the tensors that they read.

    `one` is the name of 1.0.
    """
    output = node.output[0]
    arrays: dict[str, npt.NDArray[np.generic]] = {
        f"{output}_integers": product.integers,
        f"{output}_scale": product.scale,
        f"{output}_bias": product.bias,
    }
    nodes: list[NodeProto] = []

    def add(op: str, *inputs: str, result: str, **attributes: Any) -> str:
        name = f"{node.name}/{op}_{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [result], name=name, **attributes))
        return result

    left = node.input[0]
    if product.offset:
        arrays[f"{output}_offset"] = np.array(product.offset, np.float32)
        left = add("Add", left, f"{output}_offset", result=f"{output}_shifted")
    left = add("Cast", left, result=f"{output}_bytes", to=TensorProto.UINT8)
    sums = add("MatMulInteger", left, f"{output}_integers", result=f"{output}_sums")
    sums = add("Cast", sums, result=f"{output}_floats", to=TensorProto.FLOAT)
    scale = add("Mul", one, f"{output}_scale", result=f"{output}_run_scale")
    scaled = add("Mul", sums, scale, result=f"{output}_scaled")
    add("Add", scaled, f"{output}_bias", result=output)
    return nodes, [numpy_helper.from_array(array, name) for name, array in arrays.items()]
