"""The shapes of operators that move numbers, and how their attributes and inputs are read.

`shapes` has those of operators that compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from evalmode.export.exact.call import MOST_SIZES, Call, position, sizes_in
from evalmode.export.exact.outline import Outline, broadcast, dtype_numbered
from evalmode.export.exact.values import LONGEST_AXIS, Extent, NotExact, Shape


def reshape(call: Call) -> list[Outline]:
    """The sizes in the second input: 0 copies a size, and -1 is what is left."""
    old, sizes = call.shape(0), call.extents(1)
    allow_zero = call.attribute("allowzero", 0)
    new: list[Extent] = []
    inferred: int | None = None
    for index, extent in enumerate(sizes):
        if extent.exact == -1:
            inferred = index
            new.append(Extent.exactly(1))  # for now
        elif extent.exact == 0 and not allow_zero:
            if index >= len(old):
                raise NotExact(f"it copies axis {index} of {len(old)}")
            new.append(old[index])
        elif extent.lowest < 1 and extent.exact is None:
            new.append(Extent(0, None))  # which may be a size, a copy or what is left
        else:
            new.append(extent)
    if inferred is not None:
        new[inferred] = _quotient(old, [*new[:inferred], *new[inferred + 1 :]])
    sizes_kept = sizes_in(call.input(0)) if len(new) < 2 else None
    return [Outline(dtype=call.input(0).dtype, shape=tuple(new), sizes=sizes_kept)]


def _quotient(total: Shape, others: list[Extent]) -> Extent:
    """The size that completes `others` to as many elements as `total` has."""
    remaining, divisors = list(total), []
    for extent in others:
        same = [i for i, item in enumerate(remaining) if item.symbol and item.is_same_as(extent)]
        if same:
            del remaining[same[0]]
        else:
            divisors.append(extent)
    exact = math.prod(item.exact for item in remaining if item.exact is not None)
    dynamic = [item for item in remaining if item.exact is None]
    divisor = math.prod(max(item.lowest, 1) for item in divisors)
    if all(item.exact is not None for item in divisors):
        if not dynamic:
            return Extent.exactly(exact // divisor)
        if exact == divisor and len(dynamic) == 1:
            return dynamic[0]
    largest: int | None = None
    if all(item.largest is not None for item in dynamic):
        largest = exact * math.prod(item.largest or 0 for item in dynamic) // divisor
    labels = [item.label for item in dynamic if item.largest is None]
    return Extent(0, largest, label=labels[0] if labels else "")


def transpose(call: Call) -> list[Outline]:
    """The axes in the order of `perm`."""
    shape = call.shape(0)
    return [
        Outline(dtype=call.input(0).dtype, shape=tuple(shape[axis] for axis in permutation(call)))
    ]


def permutation(call: Call) -> list[int]:
    """The axes of a Transpose, in reverse if none are given."""
    rank = len(call.shape(0))
    axes = list(call.attribute("perm", None) or reversed(range(rank)))
    if sorted(axes) != list(range(rank)):
        raise NotExact(f"it permutes the axes {axes} of {rank}")
    return axes


def squeeze(call: Call) -> list[Outline]:
    """The shape without the axes, which have a size of 1."""
    first, shape = call.input(0), call.shape(0)
    axes = call.axes(len(shape))
    if axes is None:
        if any(extent.exact is None for extent in shape):
            raise NotExact("it removes all axes of size 1, and some sizes vary")
        axes = [axis for axis, extent in enumerate(shape) if extent.exact == 1]
    kept = tuple(extent for axis, extent in enumerate(shape) if axis not in axes)
    return [Outline(dtype=first.dtype, shape=kept, sizes=sizes_in(first))]


def unsqueeze(call: Call) -> list[Outline]:
    """The shape with new axes of size 1."""
    first, shape = call.input(0), call.shape(0)
    values = _new_axes(call, len(shape))
    rest = iter(shape)
    new = tuple(
        Extent.exactly(1) if axis in values else next(rest)
        for axis in range(len(shape) + len(values))
    )
    return [Outline(dtype=first.dtype, shape=new, sizes=sizes_in(first) if len(new) < 2 else None)]


def _new_axes(call: Call, rank: int) -> set[int]:
    values = call.integers(1, "axes").tolist()
    axes = {position(value, rank + len(values)) for value in values}
    if len(axes) < len(values):
        raise NotExact("it names an axis twice")
    return axes


def flatten(call: Call) -> list[Outline]:
    """A matrix: the axes before `axis`, and those from it on."""
    shape = call.shape(0)
    axis = int(call.attribute("axis", 1))
    axis = axis + len(shape) if axis < 0 else axis
    new = (_quotient(shape[:axis], []), _quotient(shape[axis:], []))
    return [Outline(dtype=call.input(0).dtype, shape=new)]


def gather(call: Call) -> list[Outline]:
    """The data's shape, with that of the indices in place of the axis."""
    data, indices = call.shape(0), call.shape(1)
    axis = call.axis("axis", 0, len(data))
    new = data[:axis] + indices + data[axis + 1 :]
    sizes, positions = sizes_in(call.input(0)), call.input(1).integers
    picked = None
    if sizes is not None and positions is not None and len(data) == 1 and len(new) < 2:
        picked = tuple(sizes[position(int(index), len(sizes))] for index in positions)
    return [Outline(dtype=call.input(0).dtype, shape=new, sizes=picked)]


def gather_elements(call: Call) -> list[Outline]:
    """The shape of the indices."""
    return [Outline(dtype=call.input(0).dtype, shape=call.shape(1))]


def gather_nd(call: Call) -> list[Outline]:
    """The shape of the indices without the last axis, then the axes that are not indexed."""
    data, indices = call.shape(0), call.shape(1)
    batch = int(call.attribute("batch_dims", 0))
    depth = indices[-1].exact if indices else None
    if depth is None:
        raise NotExact("how many axes it indexes is not known")
    return [Outline(dtype=call.input(0).dtype, shape=indices[:-1] + data[batch + depth :])]


def concat(call: Call) -> list[Outline]:
    """The sum of the sizes along the axis."""
    shapes = [call.shape(index) for index in range(len(call.inputs))]
    axis = call.axis("axis", 0, len(shapes[0]))
    if len({len(shape) for shape in shapes}) > 1:
        raise NotExact("its inputs have different ranks")
    joined = list(shapes[0])
    for shape in shapes[1:]:
        for index, extent in enumerate(shape):
            if index == axis:
                joined[index] = _sum(joined[index], extent)
            elif joined[index].exact is None:
                joined[index] = extent if extent.exact is not None else joined[index]
    sizes: Shape | None = ()
    for tensor in call.inputs:
        part = sizes_in(tensor) if tensor is not None else None
        sizes = None if sizes is None or part is None else sizes + part
        # A chain of Concat nodes could double the list at each of thousands of nodes.
        if sizes is None or len(sizes) > MOST_SIZES:
            sizes = None
            break
    return [
        Outline(
            dtype=call.input(0).dtype,
            shape=tuple(joined),
            sizes=sizes if len(joined) == 1 else None,
        )
    ]


def _sum(a: Extent, b: Extent) -> Extent:
    if a.exact == 0:
        return b
    if b.exact == 0:
        return a
    largest = None if a.largest is None or b.largest is None else a.largest + b.largest
    label = next((item.label for item in (a, b) if item.largest is None), "")
    return Extent(a.lowest + b.lowest, largest, label=label)


# A larger end of a Slice backwards stands for no end in some runtimes.
_LARGEST_END = 2**62


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What Slice takes of one axis; None stands for a value that is not known."""

    axis: int
    start: int | None
    end: int | None
    step: int
    end_extent: Extent | None = None


def cuts(call: Call) -> list[Cut]:
    """What a Slice takes of each axis that it names.

    Raises NotExact where runtimes would take different elements.
    """
    shape = call.shape(0)
    starts, ends = call.extents(1), call.extents(2)
    axes = list(range(len(starts)))
    if call.has(3):
        axes = [position(value, len(shape)) for value in call.integers(3, "axes").tolist()]
    steps = call.integers(4, "steps").tolist() if call.has(4) else [1] * len(axes)
    if not len(starts) == len(ends) == len(axes) == len(steps) or len(set(axes)) < len(axes):
        raise NotExact("its starts, ends, axes and steps do not fit one another")
    result = []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step == 0:
            raise NotExact("it has a step of 0")
        if step < 0:
            # Of 5 elements from -6 backwards NumPy takes none, and ONNX Runtime the first. With the
            # largest integer as the end NumPy takes none, and ONNX Runtime all.
            is_known = start.exact is not None and end.exact is not None
            if not is_known or start.lowest < -shape[axis].lowest or end.lowest > _LARGEST_END:
                raise NotExact("it runs backwards between limits that runtimes read differently")
        result.append(
            Cut(axis=axis, start=start.exact, end=end.exact, step=int(step), end_extent=end)
        )
    return result


def slice_(call: Call) -> list[Outline]:
    """What is left of each axis that is cut."""
    new = list(call.shape(0))
    picked = sizes_in(call.input(0)) if len(new) == 1 else None
    for cut in cuts(call):
        extent = new[cut.axis]
        is_from_start = cut.start == 0 and cut.step == 1
        whole = extent.exact
        if whole is not None and cut.start is not None and cut.end is not None:
            part = range(whole)[slice(cut.start, cut.end, cut.step)]
            new[cut.axis] = Extent.exactly(len(part))
            picked = None if picked is None else tuple(picked[index] for index in part)
            continue
        picked = None
        if is_from_start and cut.end is not None and cut.end >= LONGEST_AXIS:
            continue
        end = cut.end_extent
        if is_from_start and end is not None and end.lowest >= 0:
            if whole is not None and end.largest is not None and end.largest <= whole:
                new[cut.axis] = end
                continue
            if end.is_same_as(extent):
                continue
        largest = extent.largest
        if is_from_start and end is not None and end.lowest >= 0 and end.largest is not None:
            largest = end.largest if largest is None else min(largest, end.largest)
        new[cut.axis] = Extent(0, largest, label=extent.label)
    return [Outline(dtype=call.input(0).dtype, shape=tuple(new), sizes=picked)]


def split(call: Call) -> list[Outline]:
    """The parts of the axis, in equal sizes if none are given."""
    shape = call.shape(0)
    axis = call.axis("axis", 0, len(shape))
    parts = split_sizes(call)
    return [
        Outline(
            dtype=call.input(0).dtype,
            shape=(*shape[:axis], Extent.exactly(part), *shape[axis + 1 :]),
        )
        for part in parts
    ]


def split_sizes(call: Call) -> list[int]:
    """The sizes of a Split's outputs along its axis.

    Raises NotExact for sizes that do not cover the axis, which runtimes refuse or read differently.
    """
    shape = call.shape(0)
    whole = shape[call.axis("axis", 0, len(shape))].exact
    if call.has(1):
        sizes = [int(value) for value in call.integers(1, "sizes")]
        if min(sizes) < 0 or (whole is not None and sum(sizes) != whole):
            raise NotExact(f"it splits {whole} elements into parts of {sizes}")
        return sizes
    if whole is None:
        raise NotExact("it splits an axis whose size varies")
    count = int(call.attribute("num_outputs", call.output_count))
    if whole % count:
        raise NotExact(f"it splits {whole} elements into {count} parts, which are not equal")
    return [whole // count] * count


def expand(call: Call) -> list[Outline]:
    """The input broadcast to the sizes in the second input."""
    return [
        Outline(dtype=call.input(0).dtype, shape=broadcast(call.shape(0), _sizes(call.extents(1))))
    ]


def tile(call: Call) -> list[Outline]:
    """The sizes times the repeats."""
    shape, repeats = call.shape(0), call.integers(1, "repeats").tolist()
    if len(repeats) != len(shape):
        raise NotExact("its repeats do not fit its input")
    new = [
        extent
        if repeat == 1
        else Extent(
            extent.lowest * repeat,
            None if extent.largest is None else extent.largest * repeat,
            label=extent.label,
        )
        for extent, repeat in zip(shape, repeats, strict=True)
    ]
    return [Outline(dtype=call.input(0).dtype, shape=tuple(new))]


def pad(call: Call) -> list[Outline]:
    """The sizes and the pads on both sides; a negative pad is not followed."""
    new = list(call.shape(0))
    for axis, (before, after) in pads(call).items():
        new[axis] = _sum(new[axis], Extent.exactly(before + after))
    return [Outline(dtype=call.input(0).dtype, shape=tuple(new))]


def pads(call: Call) -> dict[int, tuple[int, int]]:
    """How many elements a Pad adds before and after each axis that it names."""
    rank = len(call.shape(0))
    values = call.integers(1, "pads").tolist()
    axes = list(range(rank))
    if call.has(3):
        axes = [position(value, rank) for value in call.integers(3, "axes").tolist()]
    if len(values) != 2 * len(axes) or min(values, default=0) < 0:
        raise NotExact(f"its pads are {values}")
    return {axis: (values[index], values[index + len(axes)]) for index, axis in enumerate(axes)}


def constant_of_shape(call: Call) -> list[Outline]:
    """The sizes in the input, and the type of the value."""
    value = call.attribute("value", None)
    dtype = np.dtype(np.float32) if value is None else dtype_numbered(value.data_type)
    return [Outline(dtype=dtype, shape=_sizes(call.extents(0)))]


def _sizes(extents: Shape) -> Shape:
    """Extents that sizes can have: none is negative."""
    return tuple(
        Extent(0, extent.largest, label=extent.label) if extent.lowest < 0 else extent
        for extent in extents
    )
