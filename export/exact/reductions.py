"""The bounds of reductions: sums, means and extremes over axes, in any order."""

from __future__ import annotations

import numpy as np

from evalmode.export.exact.arithmetic import absolute, dtype_of
from evalmode.export.exact.call import Call
from evalmode.export.exact.outline import Outline, largest_size
from evalmode.export.exact.shapes import reduced_axes
from evalmode.export.exact.values import (
    FLOAT32,
    LONGEST_AXIS,
    Bounds,
    NotExact,
    bounded,
    integer_bounds,
    require_factor,
)


def reduce_sum(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The sum over some axes, in any order."""
    return [reduced_sum(call, call.bounds(0), "terms")]


def reduce_sum_square(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The sum of squares over some axes, in any order."""
    x = call.bounds(0)
    require_factor(x)
    _require_axes(call)
    square = bounded(
        dtype_of(call),
        grid=2 * x.grid,
        low=np.zeros_like(x.low),
        high=np.square(x.largest),
        bits=np.where(x.bits == 1, 1, 2 * x.bits),
        what="a square",
    )
    return [reduced_sum(call, square, "squares")]


def reduce_l1(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The sum of magnitudes over some axes, in any order."""
    _require_axes(call)
    return [reduced_sum(call, absolute(call, outputs)[0], "magnitudes")]


def _require_axes(call: Call) -> None:
    """Raise NotExact for a reduction without axes that is more than a sum.

    Earlier opsets say that it returns its input, later ones that it computes the square or the
    magnitude of each number.
    """
    if not reduced_axes(call):
        raise NotExact("it reduces no axis, which runtimes read differently")


def reduce_mean(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The mean over a power of two of numbers: a sum, and a change of the exponent."""
    dtype = dtype_of(call)
    if dtype != FLOAT32:
        raise NotExact(f"it takes the mean of {dtype.name} numbers")
    count = 1
    for axis in reduced_axes(call):
        size = call.shape(0)[axis].exact
        if size is None or size < 1 or size & (size - 1):
            label = "a size that varies" if size is None else f"{size} numbers"
            raise NotExact(f"it divides by {label}, which is no power of two")
        count *= size
    result = reduced_sum(call, call.bounds(0), "terms")
    return [
        bounded(
            dtype,
            grid=result.grid - (count.bit_length() - 1),
            low=result.low / count,
            high=result.high / count,
            negative_zero=result.negative_zero,
            what="the mean",
        )
    ]


def reduced_sum(call: Call, x: Bounds, noun: str) -> Bounds:
    """The bounds of every partial sum of numbers with the bounds `x`, over the axes of the node.

    The result is a partial sum too. Its own bounds may be narrower, but a runtime may fold what
    follows into the sum.
    """
    dtype, shape, axes = dtype_of(call), call.shape(0), reduced_axes(call)
    if not axes:
        return x
    low, high, grid = np.minimum(x.low, 0), np.maximum(x.high, 0), x.grid
    count = 1
    for axis in axes:
        size = largest_size(shape[axis])
        if axis == len(shape) - 1 and x.channels == size:
            low, high = np.asarray(low.sum()), np.asarray(high.sum())
            grid = np.asarray(grid.min())
            count *= size
        else:
            low, high, count = low * size, high * size, count * size
    if len(shape) - 1 in axes and grid.ndim:  # channels of which not all are known
        low, high, grid = np.asarray(low.min()), np.asarray(high.max()), np.asarray(grid.min())
    return bounded(
        dtype,
        grid=grid,
        low=low,
        high=high,
        negative_zero=x.negative_zero,
        what=f"a partial sum of {count} {noun}",
    )


def reduce_extreme(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The largest or smallest number over some axes, none of which is empty."""
    dtype_of(call)
    shape, axes, x = call.shape(0), reduced_axes(call), call.bounds(0)
    if not axes:
        return [x]
    for axis in axes:
        if shape[axis].lowest < 1:
            raise NotExact(f"it takes the extreme over axis {axis}, which may be empty")
    return [x.together() if len(shape) - 1 in axes else x]


def arg_extreme(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The index of the first largest or smallest number along an axis."""
    dtype_of(call)
    call.bounds(0)
    extent = call.shape(0)[reduced_axes(call)[0]]
    if extent.lowest < 1:
        raise NotExact("it takes the extreme over an axis that may be empty")
    largest = LONGEST_AXIS if extent.largest is None else extent.largest
    return [integer_bounds(0, largest - 1)]


def cumulative_sum(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """Partial sums along an axis."""
    dtype, shape = dtype_of(call), call.shape(0)
    axis = int(call.integers(1, "axis")[0])
    size = largest_size(shape[axis % len(shape)])
    x = call.bounds(0)
    if axis % len(shape) == len(shape) - 1:
        x = x.together()
    return [
        bounded(
            dtype,
            grid=x.grid,
            low=np.minimum(x.low, 0) * size,
            high=np.maximum(x.high, 0) * size,
            negative_zero=x.negative_zero,
            what=f"a partial sum of {size} terms",
        )
    ]
