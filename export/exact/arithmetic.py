"""The bounds of elementwise arithmetic, comparisons and casts.

Signs of zero: x + (-x) is +0.0 in the default rounding direction, so a sum is -0.0 only if all its
terms are. Whether a maximum of -0.0 and 0.0 is one or the other depends on the machine.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from evalmode.export.exact.call import Call
from evalmode.export.exact.outline import Outline
from evalmode.export.exact.values import (
    BOOL,
    FLOAT32,
    LARGEST_INTEGER,
    LONGEST_AXIS,
    Bounds,
    Floats,
    NotExact,
    Tensor,
    bounded,
    integer_bounds,
    joined,
    limits_of,
    require_factor,
    type_bounds,
)

BoundsRule = Callable[[Call, list[Outline]], list[Bounds]]


def aligned(first: Bounds, second: Bounds) -> tuple[Bounds, Bounds]:
    """Both bounds, without channels if they have different numbers of them."""
    if first.channels and second.channels and first.channels != second.channels:
        return first.together(), second.together()
    return first, second


def dtype_of(call: Call, index: int = 0) -> np.dtype[np.generic]:
    """The type of an input, if its arithmetic is followed. Raises NotExact otherwise."""
    dtype = call.input(index).dtype
    if dtype is None or (dtype != FLOAT32 and dtype != BOOL and dtype.kind not in "iu"):
        name = "elements of a type that is not known" if dtype is None else f"{dtype.name} numbers"
        raise NotExact(f"it computes with {name}, and only float32 and integers are followed")
    return dtype


def add(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The sum of two tensors."""
    a, b = aligned(call.bounds(0), call.bounds(1))
    return [_sum(call, a, b)]


def _sum(call: Call, a: Bounds, b: Bounds) -> Bounds:
    # A runtime may remove the addition of a constant 0, which would have made 0.0 out of -0.0.
    a_is_zero = not a.largest.any()
    b_is_zero = not b.largest.any()
    negative_zero = a.negative_zero and b.negative_zero
    if (a_is_zero and b.negative_zero) or (b_is_zero and a.negative_zero):
        negative_zero = True
    return bounded(
        dtype_of(call),
        grid=np.minimum(a.grid, b.grid),
        low=a.low + b.low,
        high=a.high + b.high,
        negative_zero=negative_zero,
        what="the sum",
    )


def subtract(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The difference of two tensors."""
    a, b = aligned(call.bounds(0), call.bounds(1))
    return [
        bounded(
            dtype_of(call),
            grid=np.minimum(a.grid, b.grid),
            low=a.low - b.high,
            high=a.high - b.low,
            negative_zero=a.negative_zero,
            what="the difference",
        )
    ]


def total(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The sum of any number of tensors, in any order."""
    parts = [call.bounds(index).together() for index in range(len(call.inputs))]
    if len(parts) == 1:
        return parts
    low = sum(np.minimum(part.low, 0) for part in parts)
    high = sum(np.maximum(part.high, 0) for part in parts)
    grid = min(int(part.grid) for part in parts)
    what = f"a partial sum of {len(parts)} terms"
    # Any term may be a constant 0 that a runtime leaves out.
    negative_zero = any(part.negative_zero for part in parts)
    return [
        bounded(
            dtype_of(call), grid=grid, low=low, high=high, negative_zero=negative_zero, what=what
        )
    ]


def multiply(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The product of two tensors. Significands multiply; a power of two changes the exponent."""
    a, b = aligned(call.bounds(0), call.bounds(1))
    low, high = corners(a, b)
    negative_zero = may_give_negative_zero(a, b)
    if call.is_same_input(0, 1):
        low = np.zeros_like(low)
        high = np.square(a.largest)
        negative_zero = False
    bits = np.where((a.bits == 1) | (b.bits == 1), np.maximum(a.bits, b.bits), a.bits + b.bits)
    result = bounded(
        dtype_of(call),
        grid=a.grid + b.grid,
        low=low,
        high=high,
        bits=bits,
        negative_zero=negative_zero,
        what="the product",
    )
    require_factor(a)
    require_factor(b)
    return [result]


def corners(a: Bounds, b: Bounds) -> tuple[Floats, Floats]:
    """The smallest and the largest product of numbers within the bounds.

    Products of two bounds of float32 numbers, or of integers below 2^26, are exact; others are
    refused by the check of the result.
    """
    products = np.stack(
        np.broadcast_arrays(a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high)
    )
    return products.min(axis=0), products.max(axis=0)


def may_give_negative_zero(a: Bounds, b: Bounds) -> bool:
    """Whether some product may be -0.0: a zero times a number of the other sign."""
    return (
        a.negative_zero
        or b.negative_zero
        or (a.has_zero and bool((b.low < 0).any()))
        or (b.has_zero and bool((a.low < 0).any()))
    )


def divide(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """A quotient of integers that are not negative; a float quotient rounds."""
    return [_quotient(call, is_remainder=False)]


def modulo(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """A remainder of integers that are not negative."""
    return [_quotient(call, is_remainder=True)]


def _quotient(call: Call, *, is_remainder: bool) -> Bounds:
    dtype = dtype_of(call)
    if dtype.kind not in "iu":
        raise NotExact("a quotient of float32 numbers rounds")
    a, b = call.bounds(0).together(), call.bounds(1).together()
    if b.low < 1:
        raise NotExact("it may divide by zero or by a negative integer")
    if a.low < 0:
        raise NotExact("it divides negative integers, for which runtimes round differently")
    if is_remainder:
        return integer_bounds(0, np.minimum(a.high, b.high - 1))
    # The bound need not be tight, and dividing by the smallest divisor may round in float64.
    return integer_bounds(0, a.high if b.low == 1 else np.ceil(a.high / b.low))


def negate(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The number with the other sign."""
    x = call.bounds(0)
    return [
        bounded(
            dtype_of(call),
            grid=x.grid,
            low=-x.high,
            high=-x.low,
            bits=x.bits,
            negative_zero=x.has_zero,
            what="the negative",
        )
    ]


def absolute(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The magnitude. A runtime may compute it as max(x, -x), so -0.0 may remain."""
    x = call.bounds(0)
    low = np.where((x.low <= 0) & (x.high >= 0), 0, np.minimum(np.abs(x.low), np.abs(x.high)))
    return [
        bounded(
            dtype_of(call),
            grid=x.grid,
            low=low,
            high=x.largest,
            bits=x.bits,
            negative_zero=x.negative_zero,
            what="the magnitude",
        )
    ]


def sign(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """-1, 0 or 1."""
    x = call.bounds(0)
    return [
        bounded(
            dtype_of(call),
            low=np.sign(x.low),
            high=np.sign(x.high),
            negative_zero=x.negative_zero,
            what="the sign",
        )
    ]


def floor(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The largest integer that is not above the number."""
    return [_to_integers(call, np.floor)]


def ceiling(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The smallest integer that is not below the number."""
    return [_to_integers(call, np.ceil)]


def round_(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The nearest integer, and of two the even one, as NumPy and ONNX have it."""
    return [_to_integers(call, np.rint)]


def _to_integers(call: Call, function: np.ufunc) -> Bounds:
    dtype, x = dtype_of(call), call.bounds(0)
    if dtype != FLOAT32:
        raise NotExact(f"it rounds {dtype.name} numbers to integers")
    # Ceil and Round make -0.0 of a number between -1 and 0, Floor only of -0.0.
    from_fractions = bool(((x.grid < 0) & (x.low < 0)).any()) and function is not np.floor
    return bounded(
        dtype,
        grid=np.maximum(x.grid, 0),
        low=function(x.low),
        high=function(x.high),
        negative_zero=x.negative_zero or from_fractions,
        what="the integer",
    )


def relu(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The number, or 0 if it is negative."""
    x = call.bounds(0)
    return [
        bounded(
            dtype_of(call),
            grid=x.grid,
            low=np.maximum(x.low, 0),
            high=np.maximum(x.high, 0),
            bits=x.bits,
            negative_zero=x.negative_zero,
            what="the number",
        )
    ]


def clip(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The number within two limits, which are scalars.

    A limit that no number reaches has no influence, so it may be infinite.
    """
    dtype, x = dtype_of(call), call.bounds(0)
    lowest, lower = _limit(call, 1)
    highest, upper = _limit(call, 2)
    if lowest is not None and highest is not None and lowest[1] > highest[0]:
        raise NotExact(
            f"its minimum {lowest[1]:g} may be above its maximum {highest[0]:g}, on which runtimes"
            " differ"
        )
    # A limit of -0.0 may replace 0.0, so one that equals a bound counts.
    if lowest is not None and lowest[1] < float(x.low.min()):
        lower = None
    if highest is not None and highest[0] > float(x.high.max()):
        upper = None
    grid, bits, low, high, negative_zero = x.grid, x.bits, x.low, x.high, x.negative_zero
    for limit, cut in ((lower, np.maximum), (upper, np.minimum)):
        if limit is None:
            continue
        bounds = limit.bounds.together()
        grid, bits = np.minimum(grid, bounds.grid), np.maximum(bits, bounds.bits)
        low, high = np.asarray(cut(low, bounds.low)), np.asarray(cut(high, bounds.high))
        negative_zero = negative_zero or bounds.negative_zero
    return [
        bounded(
            dtype,
            grid=grid,
            low=low,
            high=high,
            bits=bits,
            negative_zero=negative_zero,
            what="the number",
        )
    ]


def _limit(call: Call, index: int) -> tuple[tuple[float, float] | None, Tensor | None]:
    """The smallest and the largest value of a limit, and the limit; None if it is left out."""
    if not call.has(index):
        return None, None
    tensor = call.input(index)
    if tensor.array is not None and tensor.array.size == 1:
        value = float(tensor.array.reshape(-1)[0])
        if not np.isnan(value):
            return (value, value), tensor
    bounds = tensor.bounds.together()
    return (float(bounds.low), float(bounds.high)), tensor


def maximum(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The largest of any number of tensors."""
    return [_extreme(call, np.maximum)]


def minimum(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The smallest of any number of tensors."""
    return [_extreme(call, np.minimum)]


def _extreme(call: Call, function: np.ufunc) -> Bounds:
    dtype_of(call)
    result = call.bounds(0)
    for index in range(1, len(call.inputs)):
        a, b = aligned(result, call.bounds(index))
        # Each result is one of the numbers, so it needs no check.
        result = Bounds(
            grid=np.minimum(a.grid, b.grid),
            low=np.asarray(function(a.low, b.low)),
            high=np.asarray(function(a.high, b.high)),
            bits=np.maximum(a.bits, b.bits),
            negative_zero=a.negative_zero or b.negative_zero,
        )
    return result


def where(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """A number of either tensor; the condition has bounds, so it is the same everywhere."""
    call.bounds(0)
    return [joined([call.bounds(1), call.bounds(2)])]


def boolean(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """A comparison or a boolean operator: -0.0 and 0.0 compare as equal."""
    for index in range(len(call.inputs)):
        dtype_of(call, index)
        call.bounds(index)
    return [type_bounds(BOOL)]


def cast(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The same number in another type, which must hold it; an integer type drops the fraction.

    Runtimes drop a fraction as C does: -1.5 becomes -1. ONNX says nothing of a number like 255.5
    for uint8, whose integer fits while the number does not. So the number itself must fit.
    """
    target = outputs[0].dtype
    source, x = dtype_of(call), call.bounds(0)
    if target is None or (target not in (FLOAT32, BOOL) and target.kind not in "iu"):
        name = "a type that is not known" if target is None else target.name
        raise NotExact(f"it casts to {name}, and only float32 and integers are followed")
    if target == BOOL:
        return [type_bounds(BOOL)]
    if target == FLOAT32:
        if source == FLOAT32:
            return [x]
        return [bounded(target, low=x.low, high=x.high, bits=x.bits, what="the integer")]
    low, high = float(x.low.min()), float(x.high.max())
    smallest, largest = limits_of(target)
    # In float64 the largest 64-bit integer is 2^63, which a float32 may be although no integer is.
    is_beyond = source == FLOAT32 and target.itemsize == 8 and high >= largest
    if low < smallest or high > largest or is_beyond:
        raise NotExact(f"numbers from {low:.6g} to {high:.6g} do not all fit {target.name}")
    return [integer_bounds(np.trunc(x.low), np.trunc(x.high))]


def shape_sizes(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The sizes of axes."""
    sizes = outputs[0].sizes or ()
    if not sizes:
        return [integer_bounds(0, 0)]
    low = [float(extent.lowest) for extent in sizes]
    high = [float(LONGEST_AXIS if extent.largest is None else extent.largest) for extent in sizes]
    bounds = integer_bounds(low, high)
    return [bounds.together() if len(sizes) == 1 else bounds]


def element_count(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The number of elements."""
    call.shape(0)
    return [integer_bounds(0, LONGEST_AXIS)]


def range_(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """Integers from start to limit."""
    dtype = dtype_of(call)
    if dtype.kind not in "iu":
        raise NotExact("it counts in float32")
    start, limit, step = (call.bounds(index).together() for index in range(3))
    if step.low < 1:
        raise NotExact("its step may be zero or negative")
    high = np.maximum(start.high, limit.high - 1)
    if high > LARGEST_INTEGER:
        raise NotExact("its limit is not bounded")
    return [integer_bounds(start.low, high)]
