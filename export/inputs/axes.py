"""Which axes of a module's inputs vary, from what the user says or from the samples; and inputs of
other sizes.

Knows no module and no rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evalmode.export.inputs.errors import UnusableInputs

BATCH = "batch"
_LENGTH = "length"

Sample: TypeAlias = Mapping[str, Tensor]
# For each input, the axes that vary and their names: {"input_ids": {0: "batch", 1: "length"}}.
Axes: TypeAlias = Mapping[str, Mapping[int, str]]


def parse_axes(given: Sequence[str], sample: Sample) -> Axes:
    """The axes that `NAME=batch,length,_` names for each input; `_` stands for an axis that does
    not vary.

    Raises UnusableInputs for an input that there is not, or for another number of axes than it has.
    """
    axes: dict[str, dict[int, str]] = {}
    for text in given:
        name, equals, names = text.partition("=")
        words = [word.strip() for word in names.split(",")]
        if not equals or not all(re.fullmatch(r"[A-Za-z_]\w*", word) for word in words):
            raise UnusableInputs(
                "--dynamic-axes must read NAME=batch,length with `_` for a fixed axis, got"
                f" {text!r}"
            )
        if name not in sample:
            raise UnusableInputs(
                f"--dynamic-axes names the input {name!r}, the inputs are {', '.join(sample)}"
            )
        if len(words) != sample[name].ndim:
            raise UnusableInputs(
                f"--dynamic-axes gives {name} {len(words)} axes, its sample has {sample[name].ndim}"
            )
        axes[name] = {place: word for place, word in enumerate(words) if word != "_"}
    return axes


def infer_axes(samples: Sequence[Sample]) -> Axes:
    """The axes whose size differs between samples, and the first one when all inputs agree on its
    size.

    Axes that have equal sizes in every sample share a name: the first that is not the batch is
    `length`.
    """
    sizes = {
        (name, place): tuple(sample[name].shape[place] for sample in samples)
        for name, tensor in samples[0].items()
        for place in range(tensor.ndim)
    }
    # a number without axes has none to compare
    first = {found for (_, place), found in sizes.items() if place == 0}
    has_batch = len(first) == 1
    names = {next(iter(first)): BATCH} if has_batch else {}
    axes: dict[str, dict[int, str]] = {name: {} for name in samples[0]}
    for (name, place), found in sizes.items():
        if place == 0 and has_batch:
            axes[name][0] = BATCH
        elif len(set(found)) > 1:
            varying = len(names) - has_batch
            axes[name][place] = names.setdefault(found, f"{_LENGTH}{varying or ''}")
    return axes


def sizes_of(sample: Sample, axes: Axes) -> dict[str, int]:
    """The size of every named axis in a sample. Raises UnusableInputs when two axes of one name
    differ.
    """
    sizes: dict[str, int] = {}
    for name, places in axes.items():
        for place, axis in places.items():
            size = sample[name].shape[place]
            if sizes.setdefault(axis, size) != size:
                raise UnusableInputs(
                    f"axis {axis!r} is {sizes[axis]} in one input and {size} in {name}"
                )
    return sizes


def shapes_of(inputs: Mapping[str, Tensor | npt.NDArray[np.generic]]) -> str:
    """The inputs' shapes in words: `ids [3, 9], mask [3, 9]`."""
    return ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())


def resized(sample: Sample, axes: Axes, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The sample with named axes of other sizes: cut at the end, or repeated from the start."""
    found = {}
    for name, tensor in sample.items():
        for place, axis in axes.get(name, {}).items():
            if axis in sizes:
                index = torch.arange(sizes[axis]) % max(1, tensor.shape[place])
                tensor = tensor.index_select(place, index)
        found[name] = tensor.contiguous()
    return found


def ends(sample: Sample, axes: Axes) -> Iterator[dict[str, Tensor]]:
    """The sample with each axis at its ends and beyond: 1, 2, half, twice; for the batch 1, 2, 5
    and 65 rows.
    """
    whole = sizes_of(sample, axes)
    yield resized(sample, axes, {})
    if BATCH in whole:
        for rows in (1, 2, 5, 65):
            yield resized(sample, axes, {BATCH: rows})
    for axis, size in whole.items():
        if axis == BATCH:
            continue
        for other in sorted({1, 2, max(1, size // 2), max(1, size - 1), 2 * size} - {size}):
            yield resized(sample, axes, {axis: other})
            if BATCH in whole:
                yield resized(sample, axes, {axis: other, BATCH: 1})


def resampled(sample: Sample, seed: int) -> dict[str, Tensor]:
    """Other values: each tensor's elements drawn anew from its own, so that ids, masks and ranges
    stay what they were.

    Float rows are made smaller by a factor each, so that numbers and magnitudes appear which the
    sample does not hold. A mask stays as it is: a position that may look at nothing is no input
    that a network is made for.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor if _is_mask(tensor) else _resampled(tensor, generator)
        for name, tensor in sample.items()
    }


def keeps_masks(sample: Sample, made: Sample) -> bool:
    """Whether no row of a mask lost its last one when sizes changed."""
    masks = [
        name for name, tensor in sample.items() if _is_mask(tensor) and bool(tensor.any(-1).all())
    ]
    return all(bool(made[name].any(-1).all()) for name in masks)


def _is_mask(tensor: Tensor) -> bool:
    """Whether a tensor of whole numbers or booleans holds zeros and ones alone."""
    return (
        tensor.ndim > 0
        and not tensor.is_floating_point()
        and bool(((tensor == 0) | (tensor == 1)).all())
    )


def _resampled(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.numel() == 0:
        return tensor
    pool = tensor.reshape(-1)
    drawn = pool[torch.randint(pool.numel(), tensor.shape, generator=generator)]
    if not tensor.is_floating_point():
        return drawn
    if bool((pool == pool[0]).all()):  # a sample of ones or zeros: any numbers will do
        drawn = drawn + torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    rows = (tensor.shape[0] if tensor.ndim else 1, *[1] * (tensor.ndim - 1))
    factor = 0.1 + 0.9 * torch.rand(rows[: max(1, tensor.ndim)], generator=generator)
    return (drawn * factor.reshape(rows if tensor.ndim else ()).to(tensor.dtype)).contiguous()
