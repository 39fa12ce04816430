"""Which axes of a module's inputs vary, from what the user says or from the samples; and inputs of
other sizes.

Knows no rule, and of a module only `run`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evalmode.export.inputs.errors import UnusableInputs

BATCH = "batch"
_LENGTH = "length"
_FEW = 6  # axes of one size, all sets of which are tried
_WIDE = 1 << 20  # a range of whole numbers that is not listed

Sample: TypeAlias = Mapping[str, Tensor]
# For each input, the axes that vary and their names: {"input_ids": {0: "batch", 1: "length"}}.
Axes: TypeAlias = Mapping[str, Mapping[int, str]]
# Answers by name; raises whatever it likes on inputs that it does not read.
Run: TypeAlias = Callable[[Sample], Mapping[str, Tensor]]

# An input and one of its axes.
_Place: TypeAlias = tuple[str, int]


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


def find_axes(run: Run, samples: Sequence[Sample]) -> Axes:
    """The axes that the samples show to vary, each with the name of the axes that it varies with.

    Axes of equal size in every sample may be one axis (ids and their mask) or several (height and
    width of square images). The module is asked: an axis that it reads at another size, with
    another answer, while the others stay is one of its own. The axis of rows is called `batch`:
    the first axis of every input, but for inputs that all rows share. Where all samples have the
    same number of rows it is a guess, which the module must confirm with one row more.

    `run` answers a sample and raises whatever it likes for sizes that it does not read.
    """
    sizes: dict[_Place, tuple[int, ...]] = {
        (name, place): tuple(sample[name].shape[place] for sample in samples)
        for name, tensor in samples[0].items()
        for place in range(tensor.ndim)
    }
    alike: dict[tuple[int, ...], list[_Place]] = {}
    for place, found in sizes.items():
        if len(set(found)) > 1:
            alike.setdefault(found, []).append(place)
    blocks: list[list[_Place]] = []
    for found, places in alike.items():
        blocks += _apart(run, samples[found.index(max(found))], places)
    rows = _rows(run, samples[0], sizes, blocks)
    if rows is not None and rows not in blocks:
        blocks.append(rows)
    axes: dict[str, dict[int, str]] = {name: {} for name in samples[0]}
    lengths = 0
    for block in sorted(blocks, key=lambda block: list(sizes).index(block[0])):
        label = BATCH if block == rows else f"{_LENGTH}{lengths or ''}"
        lengths += block != rows
        for name, index in block:
            axes[name][index] = label
    return {name: dict(sorted(places.items())) for name, places in axes.items()}


def _apart(run: Run, sample: Sample, places: list[_Place]) -> list[list[_Place]]:
    """Places of one size, in blocks that vary together."""
    if len(places) == 1:
        return [places]
    # An input of one row goes with any number of others, which would say nothing.
    size = max(sample[places[0][0]].shape[places[0][1]], 3)
    base = _at(sample, dict.fromkeys(places, size))
    answers = _answers(run, base)
    if answers is None:
        return [places]

    def reads(block: Sequence[_Place]) -> bool:
        """Whether these alone may have another size, and it shows in the answer."""
        for other in (size + 1, size - 1):
            changed = _answers(run, _at(base, dict.fromkeys(block, other)))
            if changed is not None:
                return not _same_answers(answers, changed)
        return False

    blocks: list[list[_Place]] = []
    silent: list[_Place] = []  # those that show in no answer
    left = list(places)
    while left:
        first, *others = left
        candidates = [[], [place for place in others if place[1] == first[1]]]
        if len(others) <= _FEW:
            for count in range(1, len(others)):
                candidates += map(list, combinations(others, count))
        block = next(
            ([first, *beside] for beside in (*candidates, others) if reads([first, *beside])), None
        )
        if block is None:
            silent.append(first)
            left = others
            continue
        for place in block[1:]:
            smaller = [item for item in block if item != place]
            if reads(smaller):
                block = smaller
        blocks.append(block)
        left = [place for place in others if place not in block]
    if not blocks:
        return [places]
    for place in silent:
        beside = (block for block in blocks if any(index == place[1] for _, index in block))
        next(beside, blocks[0]).append(place)
    return blocks


def _rows(
    run: Run,
    sample: Sample,
    sizes: Mapping[_Place, tuple[int, ...]],
    blocks: Sequence[list[_Place]],
) -> list[_Place] | None:
    """The places of rows: the first axis of every input that does not stay as it is."""
    first = [place for place in sizes if place[1] == 0]
    varying = [place for place in first if len(set(sizes[place])) > 1]
    if varying:
        block = next(block for block in blocks if varying[0] in block)
        inputs = [name for name, _ in block]
        together = all(place in block for place in varying) and len(set(inputs)) == len(inputs)
        return block if together else None
    several = [place for place in first if sizes[place][0] > 1] or first
    if not several or len({sizes[place] for place in several}) > 1:
        return None
    one_more = _at(sample, dict.fromkeys(several, sizes[several[0]][0] + 1))
    return several if _answers(run, one_more) is not None else None


def _at(sample: Sample, sizes: Mapping[_Place, int]) -> dict[str, Tensor]:
    """The sample with other sizes at these places."""
    axes: dict[str, dict[int, str]] = {name: {} for name in sample}
    for name, place in sizes:
        axes[name][place] = f"{name}.{place}"
    return resized(sample, axes, {f"{name}.{place}": size for (name, place), size in sizes.items()})


def _answers(run: Run, sample: Sample) -> dict[str, Tensor] | None:
    try:
        return dict(run(sample))
    except Exception:  # the user's own code, on sizes that the samples do not have
        return None


def _same_answers(answers: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return answers.keys() == others.keys() and all(
        tensor.shape == others[name].shape and torch.equal(tensor, others[name])
        for name, tensor in answers.items()
    )


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


def resized(
    sample: Sample, axes: Axes, sizes: Mapping[str, int], *, repeat: bool = False
) -> dict[str, Tensor]:
    """The sample with named axes of other sizes: cut at the end, or continued.

    More rows are the same rows again, and a mask is continued by itself. Everything else is
    continued by numbers that do not occur yet: runtimes choose differently among equal scores
    (top-k, argmax). With `repeat` it is continued by itself too.
    """
    tensors = {}
    for name, tensor in sample.items():
        other = tensor
        for place, axis in axes.get(name, {}).items():
            if axis not in sizes:
                continue
            size = other.shape[place]
            index = torch.arange(sizes[axis]) % max(1, size)
            other = other.index_select(place, index)
            if sizes[axis] > size and axis != BATCH and not repeat and not _is_mask(tensor):
                more = other.narrow(place, size, sizes[axis] - size)
                more.copy_(_others(tensor, more.shape))
        tensors[name] = other.contiguous()
    return tensors


def ends(sample: Sample, axes: Axes) -> Iterator[dict[str, int]]:
    """Sizes that reach the ends of each axis and lie beyond them: 1, 2, half, twice; for the batch
    1, 2, 5 and 65 rows.
    """
    whole = sizes_of(sample, axes)
    if BATCH in whole:
        for rows in (1, 2, 5, 65):
            yield {BATCH: rows}
    for axis, size in whole.items():
        if axis == BATCH:
            continue
        for other in sorted({1, 2, max(1, size // 2), max(1, size - 1), 2 * size} - {size}):
            yield {axis: other}
            if BATCH in whole:
                yield {axis: other, BATCH: 1}


def resampled(sample: Sample, seed: int) -> dict[str, Tensor]:
    """Other values: each tensor's elements in another order, so that ids, masks and ranges stay
    what they were.

    Float rows are made smaller by a factor each, so that numbers and magnitudes appear which the
    sample does not hold. A mask stays as it is: a position that may look at nothing is no input
    that a network is made for.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in sample.items():
        if _is_mask(tensor) or tensor.numel() == 0:
            tensors[name] = tensor
            continue
        order = torch.randperm(tensor.numel(), generator=generator)
        shuffled = tensor.reshape(-1)[order].reshape(tensor.shape)
        if tensor.is_floating_point():
            if bool((tensor == tensor.reshape(-1)[0]).all()):  # ones or zeros: any numbers will do
                noise = torch.randn(tensor.shape, generator=generator)
                shuffled = shuffled + noise.to(tensor.dtype)
            rows = [tensor.shape[0], *[1] * (tensor.ndim - 1)] if tensor.ndim else []
            factor = 0.1 + 0.9 * torch.rand(rows, generator=generator)
            shuffled = shuffled * factor.to(tensor.dtype)
        tensors[name] = shuffled.contiguous()
    return tensors


def keeps_masks(sample: Sample, made: Sample) -> bool:
    """Whether no row of a mask lost its last one when sizes changed."""
    masks = [
        name for name, tensor in sample.items() if _is_mask(tensor) and bool(tensor.any(-1).all())
    ]
    return all(bool(made[name].any(-1).all()) for name in masks)


def _is_mask(tensor: Tensor) -> bool:
    """Whether a tensor holds zeros and ones alone, or of floats zeros and one other number."""
    if tensor.ndim == 0 or tensor.numel() == 0:
        return False
    if not tensor.is_floating_point():
        return bool(((tensor == 0) | (tensor == 1)).all())
    others = tensor[tensor != 0]
    return 0 < others.numel() < tensor.numel() and bool((others == others[0]).all())


def _others(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Numbers of `shape` that `tensor` could hold and, as far as there are any, does not hold.

    Floats are numbers of the tensor, each smaller by up to one in a hundred. Whole numbers lie
    between its smallest and its largest, those that it does not hold first.
    """
    generator = torch.Generator().manual_seed(tensor.numel())
    pool, count = tensor.reshape(-1), torch.Size(shape).numel()
    if tensor.is_floating_point():
        drawn = pool[torch.randint(pool.numel(), (count,), generator=generator)].double()
        if bool((pool == pool[0]).all()):  # a sample of ones or zeros: any numbers will do
            drawn = drawn + torch.randn(count, generator=generator)
        shrink = 1 - 0.01 * torch.rand(count, generator=generator, dtype=torch.float64)
        return (drawn * shrink).to(tensor.dtype).reshape(shape)
    least, most = int(pool.min()), int(pool.max())
    numbers = pool
    if tensor.dtype != torch.bool and most - least < _WIDE:
        between = least + torch.randperm(most - least + 1, generator=generator).to(tensor.dtype)
        held = torch.isin(between, pool)
        numbers = torch.cat([between[~held], between[held]])
    return numbers[torch.arange(count) % numbers.numel()].reshape(shape)
