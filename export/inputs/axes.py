"""Names for those axes of a module's inputs whose size varies.

A *sample* holds the inputs of one call, by the name of the input. An axis that varies has a name,
such as `batch` or `length`. Axes with the same name have the same size within one sample.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from evalmode.export.inputs.errors import UnusableInputs

# The name of the axis of rows.
BATCH = "batch"
# The sign for a fixed axis in `--dynamic-axes`.
_FIXED = "_"

Sample: TypeAlias = Mapping[str, Tensor]
# For each input by name, the axes that vary: the index of the axis and its name. For example,
# {"input_ids": {0: "batch", 1: "length"}}.
Axes: TypeAlias = Mapping[str, Mapping[int, str]]


def parse_axes(texts: Sequence[str], sample: Sample) -> Axes:
    """The axes in texts of the form `INPUT=batch,length,_`, with `_` for an axis that is fixed.

    Raises UnusableInputs for a text of another form, for an input that is not in `sample`, for an
    input that is named twice, and for a wrong number of axes.

    >>> import torch
    >>> parse_axes(["ids=batch,_"], {"ids": torch.ones(2, 3)})
    {'ids': {0: 'batch'}}
    """
    axes: dict[str, dict[int, str]] = {}
    for text in texts:
        input_name, equals_sign, name_list = text.partition("=")
        axis_names = [name.strip() for name in name_list.split(",")]
        if not equals_sign or not all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in axis_names):
            raise UnusableInputs(
                "--dynamic-axes must have the form INPUT=batch,length with `_` for a fixed axis,"
                f" got {text!r}"
            )
        if input_name not in sample:
            raise UnusableInputs(
                f"--dynamic-axes names the input {input_name!r}, and the inputs are"
                f" {', '.join(sample)}"
            )
        if input_name in axes:
            raise UnusableInputs(
                f"--dynamic-axes names the input {input_name!r} twice: give all its axes at once"
            )
        axis_count = sample[input_name].ndim
        if len(axis_names) != axis_count:
            raise UnusableInputs(
                f"--dynamic-axes names {len(axis_names)} axes of {input_name}, and its sample has"
                f" {axis_count}"
            )
        axes[input_name] = {}
        for index, axis_name in enumerate(axis_names):
            if axis_name != _FIXED:
                axes[input_name][index] = axis_name
    return axes


def sizes_of(sample: Sample, axes: Axes) -> dict[str, int]:
    """The size of each named axis in a sample, by its name.

    Raises UnusableInputs where two axes with the same name have different sizes.

    >>> import torch
    >>> sizes_of({"ids": torch.ones(2, 3)}, {"ids": {0: "batch", 1: "length"}})
    {'batch': 2, 'length': 3}
    """
    sizes: dict[str, int] = {}
    first_inputs: dict[str, str] = {}
    for input_name, names_by_index in axes.items():
        for index, axis_name in names_by_index.items():
            size = sample[input_name].shape[index]
            if axis_name not in sizes:
                sizes[axis_name] = size
                first_inputs[axis_name] = input_name
            elif size != sizes[axis_name]:
                raise UnusableInputs(
                    f"axis {axis_name!r} is {sizes[axis_name]} in {first_inputs[axis_name]}"
                    f" and {size} in {input_name}"
                )
    return sizes


def shapes_of(inputs: Mapping[str, Tensor | npt.NDArray[np.generic]]) -> str:
    """The inputs' shapes, for a message: `ids [3, 9], mask [3, 9]`."""
    return ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
