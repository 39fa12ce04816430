"""The axes of a module's inputs that vary, by name.

Vocabulary: a *sample* holds the inputs of one call, by name. An *axis* that varies has a name, such
as `batch` or `length`; axes of one name always have one size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from evalmode.export.inputs.errors import UnusableInputs

# The name of the axis of rows.
BATCH = "batch"

Sample: TypeAlias = Mapping[str, Tensor]
# Input -> index of an axis that varies -> its name: {"input_ids": {0: "batch", 1: "length"}}.
Axes: TypeAlias = Mapping[str, Mapping[int, str]]
# Answers a sample with tensors by name. Raises any exception for inputs that it does not read.
Run: TypeAlias = Callable[[Sample], Mapping[str, Tensor]]


def parse_axes(texts: Sequence[str], sample: Sample) -> Axes:
    """The axes that `NAME=batch,length,_` names for each input; `_` is an axis that does not vary.

    Raises UnusableInputs for an unknown input, or a number of axes that it does not have.

    >>> import torch
    >>> parse_axes(["ids=batch,_"], {"ids": torch.ones(2, 3)})
    {'ids': {0: 'batch'}}
    """
    axes: dict[str, dict[int, str]] = {}
    for text in texts:
        input_name, equals, right = text.partition("=")
        names = [name.strip() for name in right.split(",")]
        if not equals or not all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in names):
            raise UnusableInputs(
                "--dynamic-axes must read NAME=batch,length with `_` for a fixed axis, got"
                f" {text!r}"
            )
        if input_name not in sample:
            raise UnusableInputs(
                f"--dynamic-axes names the input {input_name!r}, the inputs are {', '.join(sample)}"
            )
        axis_count = sample[input_name].ndim
        if len(names) != axis_count:
            raise UnusableInputs(
                f"--dynamic-axes gives {input_name} {len(names)} axes, its sample has {axis_count}"
            )
        axes[input_name] = {index: name for index, name in enumerate(names) if name != "_"}
    return axes


def sizes_of(sample: Sample, axes: Axes) -> dict[str, int]:
    """The size of every named axis in a sample.

    Raises UnusableInputs where two axes of one name have different sizes.
    """
    sizes: dict[str, int] = {}
    for input_name, names in axes.items():
        for index, axis in names.items():
            size = sample[input_name].shape[index]
            if sizes.setdefault(axis, size) != size:
                raise UnusableInputs(
                    f"axis {axis!r} is {sizes[axis]} in one input and {size} in {input_name}"
                )
    return sizes


def shapes_of(inputs: Mapping[str, Tensor | npt.NDArray[np.generic]]) -> str:
    """The inputs' shapes, for a message: `ids [3, 9], mask [3, 9]`."""
    return ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
