"""The bounds of operators that move numbers and compute none: lookups, reshapes, joins and cuts.

Bounds stay those of channels where the channels of the output are those of the input.
"""

from __future__ import annotations

import numpy as np
from onnx import numpy_helper

from evalmode.export.exact.arithmetic import dtype_of
from evalmode.export.exact.call import Call
from evalmode.export.exact.moved_shapes import cuts, pads, permutation, split_sizes
from evalmode.export.exact.outline import Outline
from evalmode.export.exact.values import (
    FLOAT32,
    MOST_CHANNELS,
    Bounds,
    Extent,
    NotExact,
    bounded,
    bounds_of_array,
    joined,
)
from evalmode.export.graph.weight import Array


def same(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The same numbers with the same channels."""
    return [call.bounds(0)]


def dropout(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The same numbers, if the mode is not training."""
    if call.has(2):
        mode = call.input(2).array
        if mode is None or mode.size != 1 or bool(mode.reshape(-1)[0]):
            raise NotExact("its training mode is on, or is not known")
    if call.output_count > 1 and call.at.has_output(1):
        raise NotExact("its mask is an output")
    return [call.bounds(0)]


def reshape(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The same numbers in the same order.

    Element i of the flat tensor is in channel i mod C, before and after.
    """
    x = call.bounds(0)
    old = x.channels
    if old is None:
        return [x]
    shape = outputs[0].shape
    new = shape[-1].exact if shape else None
    if not new:
        return [x.together()]
    if new == old:
        return [x]
    if new % old == 0 and new <= MOST_CHANNELS:
        return [x.take(np.arange(new) % old)]
    if old % new == 0:
        groups = [x.take(np.arange(start, start + new)) for start in range(0, old, new)]
        return [joined(groups) if new > 1 else joined(groups).together()]
    return [x.together()]


def transpose(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The same numbers; the channels stay if the last axis does."""
    x, axes = call.bounds(0), permutation(call)
    return [x if axes and axes[-1] == len(axes) - 1 else x.together()]


def with_other_axes(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """Squeeze and Unsqueeze: the channels stay if the last axis has the same size."""
    x = call.bounds(0)
    shape = outputs[0].shape
    is_same = shape is not None and len(shape) > 0 and shape[-1].exact == x.channels
    return [x if is_same else x.together()]


def gather(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """Numbers of the data. Every index must be inside its axis."""
    data_shape = call.shape(0)
    axis = call.axis("axis", 0, len(data_shape))
    indices = call.bounds(1).together()
    _require_inside(indices, data_shape[axis], axis)
    data = call.input(0)
    is_last = axis == len(data_shape) - 1
    positions = call.input(1).integers
    if is_last and positions is not None and data.bounds.channels is not None:
        picked = data.bounds.take(positions % data.bounds.channels)
        return [picked if len(call.shape(1)) == 1 and len(positions) > 1 else picked.together()]
    if data.array is not None and axis == 0 and indices.low >= 0:
        # Only a part of a table may be within reach of the indices.
        part = data.array[int(indices.low) : int(indices.high) + 1]
        x = data.bounds if len(part) == len(data.array) else bounds_of_array(part)
    else:
        x = data.bounds
    return [x.together() if is_last else x]


def gather_elements(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """Numbers of the data, each at an index of its own along one axis."""
    shape = call.shape(0)
    axis = call.axis("axis", 0, len(shape))
    _require_inside(call.bounds(1).together(), shape[axis], axis)
    return [call.bounds(0).together()]


def gather_nd(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """Numbers of the data, at indices of several axes."""
    shape, depth = call.shape(0), call.shape(1)[-1].exact
    batch = int(call.attribute("batch_dims", 0))
    indices = call.bounds(1)
    for position in range(depth or 0):
        if batch + position >= len(shape):
            raise NotExact("it indexes more axes than its input has")
        part = indices if indices.channels is None else indices.take(np.array([position]))
        _require_inside(part.together(), shape[batch + position], batch + position)
    return [call.bounds(0).together()]


def _require_inside(indices: Bounds, extent: Extent, axis: int) -> None:
    """Raise NotExact if an index may lie outside an axis; a negative index counts from the end."""
    if indices.low < -extent.lowest or indices.high > extent.lowest - 1:
        size = str(extent.lowest) if extent.exact is not None else f"at least {extent.lowest}"
        raise NotExact(
            f"its indices go from {float(indices.low):.6g} to {float(indices.high):.6g}, and axis"
            f" {axis} has {size} elements: give the range of the input with --range NAME=LOW:HIGH"
        )


def concat(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The numbers of all inputs."""
    shapes = [call.shape(index) for index in range(len(call.inputs))]
    axis = call.axis("axis", 0, len(shapes[0]))
    parts = [call.bounds(index) for index in range(len(call.inputs))]
    sizes = [shape[axis].exact for shape in shapes]
    if axis < len(shapes[0]) - 1:
        return [joined(parts)]
    total = sum(size or 0 for size in sizes)
    if None in sizes or not 1 < total <= MOST_CHANNELS:
        return [joined([part.together() for part in parts])]
    spread = [
        part.take(np.arange(size or 0)) if part.channels else _spread(part, size or 0)
        for part, size in zip(parts, sizes, strict=True)
        if size
    ]
    return [
        Bounds(
            grid=np.concatenate([part.grid for part in spread]),
            low=np.concatenate([part.low for part in spread]),
            high=np.concatenate([part.high for part in spread]),
            bits=np.concatenate([part.bits for part in spread]),
            negative_zero=any(part.negative_zero for part in spread),
        )
    ]


def _spread(bounds: Bounds, channels: int) -> Bounds:
    """The bounds of all numbers as those of each channel."""
    return Bounds(
        grid=np.full(channels, bounds.grid),
        low=np.full(channels, bounds.low),
        high=np.full(channels, bounds.high),
        bits=np.full(channels, bounds.bits),
        negative_zero=bounds.negative_zero,
    )


def slice_(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """A part of the numbers."""
    x, rank = call.bounds(0), len(call.shape(0))
    parts = cuts(call)
    if x.channels is None:
        return [x]
    for cut in parts:
        if cut.axis == rank - 1:
            if cut.start is None or cut.end is None:
                return [x.together()]
            part = np.arange(x.channels)[cut.start : cut.end : cut.step]
            picked = x.take(part)
            return [picked if part.size > 1 else picked.together()]
    return [x]


def split(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """Parts of the numbers."""
    x, rank = call.bounds(0), len(call.shape(0))
    sizes = split_sizes(call)
    if x.channels is None or call.axis("axis", 0, rank) != rank - 1:
        return [x] * len(sizes)
    parts, start = [], 0
    for size in sizes:
        picked = x.take(np.arange(start, start + size))
        parts.append(picked if size > 1 else picked.together())
        start += size
    return parts


def tile(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The numbers several times."""
    x = call.bounds(0)
    return [x if call.integers(1, "repeats")[-1] == 1 else x.together()]


def pad(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The numbers, and those that are added around them."""
    dtype, x, rank = dtype_of(call), call.bounds(0), len(call.shape(0))
    if pads(call).get(rank - 1, (0, 0)) != (0, 0):
        x = x.together()
    if call.attribute("mode", "constant") != "constant":
        return [x]
    added = call.bounds(2).together() if call.has(2) else bounded(dtype, low=0, high=0, what="0")
    return [joined([x, added])]


def triangle(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """The numbers, or 0."""
    return [joined([call.bounds(0), bounded(dtype_of(call), low=0, high=0, what="0")])]


def constant_of_shape(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """One number many times; 0.0 if none is given."""
    value = call.attribute("value", None)
    if value is None:
        return [bounded(FLOAT32, low=0, high=0, what="0")]
    return [bounds_of_array(numpy_helper.to_array(value).reshape(-1))]


def one_hot(call: Call, outputs: list[Outline]) -> list[Bounds]:
    """One of two numbers. Which of them depends on the indices, which must have bounds.

    ONNX's reference implementation computes off + (on - off), so the difference must be exact too.
    """
    call.bounds(0)
    values = call.bounds(2).together()
    bounded(
        dtype_of(call, 2),
        grid=values.grid,
        low=values.low - values.high,
        high=values.high - values.low,
        what="the difference of its two values",
    )
    return [values]


def fold(call: Call, outputs: list[Outline]) -> Array | None:
    """The output of an operator that moves the numbers of one stored tensor; None of others.

    It is a stored tensor, too: a product with a matrix that was transposed has sums of columns.
    """
    first = call.input(0)
    if not first.is_constant:
        return None
    array = first.array
    assert array is not None, "a constant has values"
    if call.op == "Identity":
        return array
    if call.op == "Transpose":
        return array.transpose(permutation(call))
    if call.op in ("Reshape", "Squeeze", "Unsqueeze", "Flatten"):
        sizes = [extent.exact for extent in outputs[0].shape or (Extent(0, None),)]
        if outputs[0].shape == ():
            return array.reshape(())
        known = [size for size in sizes if size is not None]
        return array.reshape(known) if len(known) == len(sizes) else None
    if call.op == "Cast" and array.dtype.kind in "iub" and outputs[0].dtype is not None:
        target = outputs[0].dtype
        if target == FLOAT32 or (target.kind in "iu" and np.can_cast(array.dtype, target)):
            if target == FLOAT32 and array.dtype.itemsize > 2:
                return None  # not every integer is a float32
            return array.astype(target)
    return None
