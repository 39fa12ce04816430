"""The bounds of matrix products: every partial sum, in any order and any grouping.

Each term lies between bounds, so each partial sum lies between the sum of the negative bounds and
that of the positive ones. These are the bounds of the result, too: a runtime may fold a scale or a
bias behind the product into the sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from evalmode.export.exact.arithmetic import (
    aligned,
    corners,
    dtype_of,
    may_give_negative_zero,
)
from evalmode.export.exact.call import Call
from evalmode.export.exact.outline import Outline, largest_size
from evalmode.export.exact.shapes import equation
from evalmode.export.exact.values import (
    COARSEST,
    FLOAT32,
    Bounds,
    Extent,
    Floats,
    Integers,
    NotExact,
    Tensor,
    bounded,
    integer_bounds,
    require_factor,
    significands,
)
from evalmode.export.graph import Weight
from evalmode.export.graph.scope import Initializer, NodeOutput
from evalmode.export.graph.weight import Array

# Elements of a weight that are examined at once.
_CHUNK = 1 << 20

INT32 = np.dtype(np.int32)


@dataclass(frozen=True, eq=False)
class ColumnSums:
    """The partial sums of a product with stored weights, one entry for each column."""

    low: Floats
    high: Floats
    grid: Integers


def column_sums(a: Bounds, weights: Array, zero_point: Floats | None = None) -> ColumnSums:
    """The bounds of each column's partial sums: a row within `a` times `weights` (..., K, N).

    `a` may have K channels. `zero_point`, () or (N,), is taken from integer weights first. The
    weights are read in parts, so that the memory is bounded.
    """
    inner, columns = weights.shape[-2:]
    a_positive = np.broadcast_to(np.maximum(a.high, 0), (inner,))
    a_negative = np.broadcast_to(np.maximum(-a.low, 0), (inner,))
    a_grid = np.broadcast_to(a.grid, (inner,))
    low, high = np.zeros(columns), np.zeros(columns)
    grid = np.full(columns, COARSEST, np.int64)
    step = max(1, _CHUNK // max(columns, 1))
    for matrix in weights.reshape(-1, inner, columns):
        matrix_low, matrix_high = np.zeros(columns), np.zeros(columns)
        for start in range(0, inner, step):
            part = matrix[start : start + step]
            rows = slice(start, start + step)
            numbers = part.astype(np.float64)
            if zero_point is not None:
                numbers = numbers - zero_point
            positive, negative = np.maximum(numbers, 0), np.maximum(-numbers, 0)
            matrix_high += a_positive[rows] @ positive + a_negative[rows] @ negative
            matrix_low -= a_negative[rows] @ positive + a_positive[rows] @ negative
            if part.dtype == FLOAT32:
                lowest_bit, _ = significands(np.ascontiguousarray(part))
                is_used = numbers != 0
                products = np.where(is_used, lowest_bit + a_grid[rows, None], COARSEST)
                grid = np.minimum(grid, products.min(axis=0))
            else:
                grid = np.minimum(grid, 0)
        low, high = np.minimum(low, matrix_low), np.maximum(high, matrix_high)
    return ColumnSums(low, high, grid)


def matrix_product(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """MatMul: NumPy's matmul."""
    return [_product(call, call.input(0), call.input(1), call.shape(0), call.shape(1))]


def _product(
    call: Call, a: Tensor, b: Tensor, a_shape: tuple[Extent, ...], b_shape: tuple[Extent, ...]
) -> Bounds:
    dtype = dtype_of(call)
    inner_a = a_shape[-1]
    inner_b = b_shape[-2] if len(b_shape) > 1 else b_shape[-1]
    if None not in (inner_a.exact, inner_b.exact) and inner_a.exact != inner_b.exact:
        raise NotExact(f"it multiplies rows of {inner_a.exact} by columns of {inner_b.exact}")
    count = min(
        (extent.largest for extent in (inner_a, inner_b) if extent.largest is not None),
        default=None,
    )
    if count is None:
        count = largest_size(inner_a)
    what = f"a partial sum of {count} products"
    bounds = a.bounds
    negative_zero = may_give_negative_zero(bounds, b.bounds) or _may_scale_negatively(call)
    if b.array is not None and b.array.ndim > 1:
        row = bounds if bounds.channels in (None, b.array.shape[-2]) else bounds.together()
        sums = column_sums(row, b.array)
        result = bounded(
            dtype,
            grid=sums.grid,
            low=sums.low,
            high=sums.high,
            negative_zero=negative_zero,
            what=what,
        )
        require_factor(bounds)
        require_factor(b.bounds)
        return result
    columns = b.bounds if len(b_shape) > 1 else b.bounds.together()
    row = bounds.together()
    low, high = corners(row, columns)
    result = bounded(
        dtype,
        grid=row.grid + columns.grid,
        low=np.minimum(low, 0) * count,
        high=np.maximum(high, 0) * count,
        negative_zero=negative_zero,
        what=what,
    )
    require_factor(row)
    require_factor(columns)
    return result


def _may_scale_negatively(call: Call) -> bool:
    """Whether an operand is a product with a single stored number that may be negative.

    ONNX Runtime's MatMulScaleFusion multiplies the sums by that number instead (1.31), and makes
    -0.0 of a sum that is 0.0. A factor that is computed may be computed when the file is loaded.
    """
    for index in range(2):
        operand = call.at.scope.argument(call.at.node, index)
        if not isinstance(operand, NodeOutput) or operand.node.op_type not in ("Mul", "Div"):
            continue
        factors = [operand.scope.argument(operand.node, position) for position in range(2)]
        stored = [factor.weight for factor in factors if isinstance(factor, Initializer)]
        if len(stored) != 1 or not isinstance(stored[0], Weight):
            return True
        if math.prod(stored[0].dims) == 1 and not stored[0].array().item() >= 0:
            return True
    return False


def gemm(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """A matrix product, and an addition; alpha and beta must be 1."""
    if call.attribute("alpha", 1.0) != 1.0 or call.attribute("beta", 1.0) != 1.0:
        raise NotExact("its alpha or its beta is not 1")
    a, b = call.input(0), call.input(1)
    a_shape, b_shape = call.shape(0), call.shape(1)
    if call.attribute("transA", 0):
        a, a_shape = _transposed(a), (a_shape[1], a_shape[0])
    if call.attribute("transB", 0):
        b, b_shape = _transposed(b), (b_shape[1], b_shape[0])
    product = _product(call, a, b, a_shape, b_shape)
    if not call.has(2):
        return [product]
    first, second = aligned(product, call.bounds(2))
    # A runtime may leave out the addition of zeros.
    is_zero = not second.largest.any()
    return [
        bounded(
            dtype_of(call),
            grid=np.minimum(first.grid, second.grid),
            low=first.low + np.minimum(second.low, 0),
            high=first.high + np.maximum(second.high, 0),
            negative_zero=first.negative_zero and (second.negative_zero or is_zero),
            what="a partial sum with the bias",
        )
    ]


def _transposed(tensor: Tensor) -> Tensor:
    """A matrix with its axes exchanged; channels are then rows, which are not told apart."""
    array = tensor.array
    if array is not None:
        return Tensor(dtype=tensor.dtype, stored=array.T)
    return Tensor(dtype=tensor.dtype, computed=tensor.bounds.together())


def convolution(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """A convolution whose kernel has one element, which is a matrix product.

    A larger kernel may be computed by Winograd's method or by a Fourier transform, which round.
    """
    x, weights = call.shape(0), call.shape(1)
    kernel = [extent.exact for extent in weights[2:]]
    if any(size != 1 for size in kernel):
        raise NotExact(
            "its kernel has several elements: a runtime may use Winograd's method, which rounds"
        )
    if any(call.attribute("pads", None) or ()):
        raise NotExact("it pads a kernel of one element")
    array = call.input(1).array
    if array is None:
        raise NotExact("its weights are computed")
    group = int(call.attribute("group", 1))
    inner = array.shape[1]
    if x[1].exact is not None and x[1].exact != inner * group:
        raise NotExact("its weights do not fit its input")
    row = call.bounds(0).together()
    require_factor(row)
    require_factor(call.bounds(1))
    matrix = array.reshape(array.shape[0], inner).T
    sums = column_sums(row, matrix)
    low, high = sums.low, sums.high
    grid, negative_zero = sums.grid, may_give_negative_zero(row, call.bounds(1))
    if call.has(2):
        bias = call.bounds(2)
        low, high = low + np.minimum(bias.low, 0), high + np.maximum(bias.high, 0)
        grid = np.minimum(grid, bias.grid)
        negative_zero = negative_zero and (bias.negative_zero or not bias.largest.all())
    result = bounded(
        dtype_of(call),
        grid=grid,
        low=low,
        high=high,
        negative_zero=negative_zero,
        what=f"a partial sum of {inner} products",
    )
    return [result.together()]  # the channels are not the last axis


def einsum(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """A sum over letters of one tensor, or of products of two."""
    inputs, output = equation(call)
    if len(inputs) > 2:
        raise NotExact("it multiplies more than two tensors, in an order that is not fixed")
    extents: dict[str, list[Extent]] = {}
    for index, letters in enumerate(inputs):
        for letter, extent in zip(letters, call.shape(index), strict=True):
            extents.setdefault(letter, []).append(extent)
    count = 1
    for letter, sizes in extents.items():
        if letter not in output:
            known = [extent.largest for extent in sizes if extent.largest is not None]
            count *= (
                max(known)
                if len(known) == len(sizes)
                else largest_size(next(extent for extent in sizes if extent.largest is None))
            )
    first = call.bounds(0).together()
    low, high, grid, negative_zero = first.low, first.high, first.grid, first.negative_zero
    if len(inputs) == 2:
        second = call.bounds(1).together()
        require_factor(first)
        require_factor(second)
        low, high = corners(first, second)
        grid, negative_zero = first.grid + second.grid, may_give_negative_zero(first, second)
    return [
        bounded(
            dtype_of(call),
            grid=grid,
            low=np.minimum(low, 0) * count,
            high=np.maximum(high, 0) * count,
            negative_zero=negative_zero,
            what=f"a partial sum of {count} products",
        )
    ]


def integer_matrix_product(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """MatMulInteger: both operands less their zero points, summed in int32."""
    a = _less_zero_point(call.bounds(0), call, 2)
    b = call.input(1)
    shape = call.shape(1)
    if len(shape) < 2:
        raise NotExact("its second input is no matrix")
    if b.array is not None:
        zero: Floats | None = None
        if call.has(3):
            zero_array = call.input(3).array
            if zero_array is None or zero_array.ndim > 1:
                raise NotExact("its zero points are computed")
            zero = zero_array.astype(np.float64)
        row = a if a.channels in (None, b.array.shape[-2]) else a.together()
        sums = column_sums(row, b.array, zero)
        low, high, count = sums.low, sums.high, b.array.shape[-2]
    else:
        second = _less_zero_point(b.bounds.together(), call, 3)
        count = largest_size(shape[-2])
        low, high = corners(a.together(), second)
        low, high = np.minimum(low, 0) * count, np.maximum(high, 0) * count
    return [bounded(INT32, low=low, high=high, what=f"a partial sum of {count} products")]


def _less_zero_point(x: Bounds, call: Call, index: int) -> Bounds:
    if not call.has(index):
        return x
    zero = call.bounds(index).together()
    return integer_bounds(x.low - zero.high, x.high - zero.low)
