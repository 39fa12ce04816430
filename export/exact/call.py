"""One node as the proof reads it: its attributes, and what is known of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper

from evalmode.export.exact.values import Bounds, Extent, NotExact, Shape, Tensor, shape_of
from evalmode.export.graph import NodeAt
from evalmode.export.graph.scope import Absent

# A longer list of integers is no list of axis sizes.
MOST_SIZES = 64


@dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """A node with its inputs; an optional input that is left out is None."""

    at: NodeAt
    inputs: Sequence[Tensor | None]

    @property
    def op(self) -> str:
        """The operator's name."""
        return self.at.node.op_type

    @property
    def output_count(self) -> int:
        """How many outputs the node names."""
        return len(self.at.node.output)

    def has(self, index: int) -> bool:
        """Whether input `index` is there."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def input(self, index: int) -> Tensor:
        """Input `index`. Raises NotExact if it is left out."""
        tensor = self.inputs[index] if index < len(self.inputs) else None
        if tensor is None:
            raise NotExact(f"its input {index} is missing")
        return tensor

    def bounds(self, index: int) -> Bounds:
        """The bounds of the numbers in input `index`."""
        return self.input(index).bounds

    def shape(self, index: int) -> Shape:
        """The shape of input `index`. Raises NotExact if its rank is not known."""
        shape = self.input(index).shape
        if shape is None:
            raise NotExact(f"the shape of its input {index} is not known")
        return shape

    def is_same_input(self, first: int, second: int) -> bool:
        """Whether two inputs are the same tensor."""
        return bool(self.at.node.input[first] == self.at.node.input[second])

    def attribute(self, name: str, default: Any) -> Any:
        """The attribute's value, or `default` if the node has none. Raises NotExact if it is not
        known.
        """
        attribute = self.at.attribute(name)
        if isinstance(attribute, Absent):
            return default
        if attribute is None:
            raise NotExact(f"its attribute {name} is not known")
        value = helper.get_attribute_value(attribute)
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

    def axis(self, name: str, default: int, rank: int) -> int:
        """An attribute that names an axis, counted from the front. Raises NotExact if none has that
        number.
        """
        return position(int(self.attribute(name, default)), rank)

    def integers(self, index: int, name: str) -> npt.NDArray[np.int64]:
        """The values of a list of integers that the graph decides. Raises NotExact otherwise."""
        values = self.input(index).integers
        if values is None:
            raise NotExact(f"its {name} are decided only when the model runs")
        return values

    def axes(self, rank: int) -> list[int] | None:
        """The axes of a reduction, a Squeeze or an Unsqueeze; None if they are left out.

        They are the second input, or an attribute in earlier opsets.
        """
        if self.has(1):
            values: Sequence[int] = self.integers(1, "axes").tolist()
        else:
            attribute = self.attribute("axes", None)
            if attribute is None:
                return None
            values = list(attribute)
        axes = [position(value, rank) for value in values]
        if len(set(axes)) < len(axes):
            raise NotExact("it names an axis twice")
        return axes

    def extents(self, index: int) -> Shape:
        """The axis sizes in input `index`; a size that is not known is an extent of any size.

        The negative sizes that Reshape has a meaning for are extents too.
        """
        tensor = self.input(index)
        sizes = sizes_in(tensor)
        if sizes is None:
            raise NotExact(f"the sizes in its input {index} are not known")
        return sizes


def sizes_in(tensor: Tensor) -> Shape | None:
    """The extents whose sizes a scalar or a list of integers holds."""
    if tensor.sizes is not None:
        return tensor.sizes
    if tensor.shape is None or len(tensor.shape) > 1:
        return None
    count = 1 if not tensor.shape else tensor.channels
    if count is None or count > MOST_SIZES:
        return None
    if tensor.integers is not None:
        return shape_of(tensor.integers.tolist())
    if tensor.dtype is None or tensor.dtype.kind not in "iu" or tensor.computed is None:
        return None
    low = np.broadcast_to(tensor.computed.low, (count,))
    high = np.broadcast_to(tensor.computed.high, (count,))
    return tuple(
        Extent(int(smallest), int(largest)) for smallest, largest in zip(low, high, strict=True)
    )


def position(axis: int, rank: int) -> int:
    """The axis counted from the front. Raises NotExact if there is none with that number."""
    if not -rank <= axis < rank:
        raise NotExact(f"it names axis {axis} of {rank}")
    return axis % rank
