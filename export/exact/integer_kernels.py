"""An exact graph with products of bytes in the place of float products, and with the same bits.

A product qualifies if its left operand holds integers from -128 to 127 or from 0 to 255, which the
proof shows, and if its weights are integers of 8 bits times a power of two for each column:

    float       Gemm(a, weights, bias)
    integer     u = Cast(a + 128)                                uint8; without the 128 from 0 on
                y = Cast(MatMulInteger(u, integers)) * scale     scale of each column, a power of 2
                y + (bias - 128 * the column's sum of weights)

Unsigned activations and signed weights are what x86 processors multiply fastest. Those without VNNI
saturate on weights of 8 bits: see `saturation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from evalmode.export.exact.call import Call
from evalmode.export.exact.limits import Limits
from evalmode.export.exact.prove import prove
from evalmode.export.exact.values import FLOAT32, NotExact, significands
from evalmode.export.graph import graph_of

# A float32 holds every integer up to this one.
_LARGEST = 2**24
_LARGEST_WEIGHT = 127
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


def with_integer_kernels(model: ModelProto, limits: Limits) -> ModelProto:
    """A copy of an exact model, in which every product that qualifies is a MatMulInteger.

    `limits` are those of the proof. Other products stay as they are.

    Example:
        limits = Limits(ranges={"input_ids": (0, 65535)}, largest={"length": 32})
        integer = with_integer_kernels(onnx.load(path), limits)
    """
    before = graph_of(model)
    limits = limits.within(before)
    proof = prove(before, ranges=limits.ranges, largest=limits.largest)
    products = {}
    for call in proof.calls:
        qualified = integer_product(call)
        if qualified is not None:
            products[call.at.node.output[0]] = qualified

    rewritten = ModelProto()
    rewritten.CopyFrom(model)
    graph = rewritten.graph
    # These would be the shapes and the types of values that are gone.
    del graph.value_info[:]
    nodes: list[NodeProto] = []
    for node in graph.node:
        product = products.get(node.output[0])
        if product is None:
            nodes.append(node)
            continue
        new_nodes, new_tensors = _written(node, product)
        nodes += new_nodes
        graph.initializer.extend(new_tensors)
    del graph.node[:]
    graph.node.extend(nodes)

    # The float weights that nothing reads any more.
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
    if low >= 0 and high <= 255:
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
    sums = np.abs(integers).sum(axis=0) * 255
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


def _written(node: NodeProto, product: IntegerProduct) -> tuple[list[NodeProto], list[TensorProto]]:
    """The nodes in the place of a float product, and the tensors that they read."""
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
    scaled = add("Mul", sums, f"{output}_scale", result=f"{output}_scaled")
    add("Add", scaled, f"{output}_bias", result=output)
    return nodes, [numpy_helper.from_array(array, name) for name, array in arrays.items()]
