"""What is known of a node's output before its numbers: the type, the shape and the axis sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import helper

from evalmode.export.exact.call import Call
from evalmode.export.exact.values import Extent, NotExact, Shape


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The type and the shape of an output, and the axis sizes that it holds, if it holds such."""

    dtype: np.dtype[np.generic] | None
    shape: Shape | None
    sizes: Shape | None = None


ShapeRule = Callable[[Call], list[Outline]]


def broadcast(first: Shape, second: Shape) -> Shape:
    """The shape of an elementwise operator's output."""
    rank = max(len(first), len(second))
    one = Extent.exactly(1)
    padded = [(one,) * (rank - len(shape)) + shape for shape in (first, second)]
    extents = []
    for a, b in zip(*padded, strict=True):
        if a.exact == 1 or (b.exact is not None and b.exact != 1):
            extents.append(b)
        elif b.exact == 1 or a.exact is not None or a.is_same_as(b):
            extents.append(a)
        else:  # at run time they are equal, or either is 1
            largest = None
            if a.largest is not None and b.largest is not None:
                largest = max(a.largest, b.largest)
            extents.append(Extent(min(a.lowest, b.lowest), largest, label=a.label or b.label))
    return tuple(extents)


def largest_size(extent: Extent) -> int:
    """The largest size. Raises NotExact, with what to give, if there is none."""
    if extent.largest is None:
        label = extent.label or "AXIS"
        raise NotExact(
            f"the axis {label} may have any size: give its largest with --largest {label}=N"
        )
    return extent.largest


def dtype_numbered(number: int) -> np.dtype[np.generic]:
    """The type with this number in ONNX. Raises NotExact if there is none."""
    try:
        return helper.tensor_dtype_to_np_dtype(number)
    except KeyError:
        raise NotExact(f"it makes elements of type {number}, which does not exist") from None
