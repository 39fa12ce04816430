"""Find out which axes of a module's inputs vary, and which vary together, from its samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import TypeAlias

import torch
from torch import Tensor

from evalmode.export.inputs.axes import BATCH, Axes, Sample
from evalmode.export.inputs.resize import resized

_LENGTH = "length"

# With up to this many other axes of one size, all sets of them are tried: about 64 for an axis.
_MOST_COMBINED = 6

# A function from a sample to the output tensors by name: a call of a module or of a graph. It may
# raise any exception for inputs that it cannot read.
Forward: TypeAlias = Callable[[Sample], Mapping[str, Tensor]]

# An input, and the index of one of its axes.
_Axis: TypeAlias = tuple[str, int]


def find_axes(run: Forward, samples: Sequence[Sample]) -> Axes:
    """The axes that vary between the samples, named `batch`, `length`, `length1`, and so on.

    1. Axes that have equal sizes in every sample are a group.
    2. A group is one axis (ids and their mask) or several (height and width of square images). The
       module decides: some axes of a group vary together if the module reads another size of them
       alone, and its answer changes.
    3. The batch is the first axis of every input, except for inputs that all rows share. If all
       samples have the same number of rows this is a guess, and the module must read one row more.

    `run` may raise any exception for sizes that the module does not read.
    """
    sizes: dict[_Axis, tuple[int, ...]] = {}
    for name, tensor in samples[0].items():
        for index in range(tensor.ndim):
            sizes[name, index] = tuple(sample[name].shape[index] for sample in samples)
    groups: dict[tuple[int, ...], list[_Axis]] = {}
    for axis, axis_sizes in sizes.items():
        if len(set(axis_sizes)) > 1:
            groups.setdefault(axis_sizes, []).append(axis)

    # A block holds the axes that vary together and have one name.
    blocks: list[list[_Axis]] = []
    for axis_sizes, group in groups.items():
        largest = samples[axis_sizes.index(max(axis_sizes))]
        blocks += _split(run, largest, group)
    batch = _find_batch(run, samples[0], sizes, blocks)
    if batch is not None and batch not in blocks:
        blocks.append(batch)

    order = list(sizes)
    blocks.sort(key=lambda block: order.index(block[0]))
    axes: dict[str, dict[int, str]] = {name: {} for name in samples[0]}
    length_count = 0
    for block in blocks:
        axis_name = BATCH
        if block != batch:
            axis_name = f"{_LENGTH}{length_count}" if length_count else _LENGTH
            length_count += 1
        for name, index in block:
            axes[name][index] = axis_name
    return {name: dict(sorted(names.items())) for name, names in axes.items()}


def _split(run: Forward, sample: Sample, group: list[_Axis]) -> list[list[_Axis]]:
    """Split axes of one size into blocks that vary together."""
    if len(group) == 1:
        return [group]
    # An input of one row is broadcast to any number of rows, so its size would prove nothing. With
    # a size of at least 3, a size that is smaller by one is above 1 too.
    first_input, first_index = group[0]
    size = max(sample[first_input].shape[first_index], 3)
    base = _with_sizes(sample, dict.fromkeys(group, size))
    answers = _answers(run, base)
    if answers is None:
        return [group]

    def varies_alone(block: Sequence[_Axis]) -> bool:
        """Whether the module reads another size of these axes only, with another answer."""
        for other_size in (size + 1, size - 1):
            changed = _answers(run, _with_sizes(base, dict.fromkeys(block, other_size)))
            if changed is None:
                continue
            return changed.keys() != answers.keys() or not all(
                tensor.shape == changed[name].shape and torch.equal(tensor, changed[name])
                for name, tensor in answers.items()
            )
        return False

    blocks: list[list[_Axis]] = []
    without_effect: list[_Axis] = []
    remaining = list(group)
    while remaining:
        first, *others = remaining
        # Candidates for the axes that vary with the first one: none, those of the same index in
        # other inputs, all sets if the group is small, and all.
        candidates = [[], [axis for axis in others if axis[1] == first[1]]]
        if len(others) <= _MOST_COMBINED:
            for count in range(1, len(others)):
                candidates += map(list, combinations(others, count))
        candidates.append(others)
        block: list[_Axis] | None = None
        for companions in candidates:
            if varies_alone([first, *companions]):
                block = [first, *companions]
                break
        if block is None:
            without_effect.append(first)
            remaining = others
            continue
        # Remove companions that need not vary with it.
        for axis in block[1:]:
            smaller = [item for item in block if item != axis]
            if varies_alone(smaller):
                block = smaller
        blocks.append(block)
        remaining = [axis for axis in others if axis not in block]
    if not blocks:
        return [group]

    # An axis that affects no answer joins the first block with an axis of its index.
    for axis in without_effect:
        joined = blocks[0]
        for block in blocks:
            if any(index == axis[1] for _, index in block):
                joined = block
                break
        joined.append(axis)
    return blocks


def _find_batch(
    run: Forward,
    sample: Sample,
    sizes: Mapping[_Axis, tuple[int, ...]],
    blocks: Sequence[list[_Axis]],
) -> list[_Axis] | None:
    """The axes of rows; None if there are none.

    If first axes vary, they are the axes of rows if they all vary together, without another axis of
    these inputs. If none varies, they are the axes of rows if they have the same size and the
    module reads one row more.
    """
    first_axes = [axis for axis in sizes if axis[1] == 0]
    varying = [axis for axis in first_axes if len(set(sizes[axis])) > 1]
    if varying:
        block = next(block for block in blocks if varying[0] in block)
        inputs = [name for name, _ in block]
        is_batch = all(axis in block for axis in varying) and len(set(inputs)) == len(inputs)
        return block if is_batch else None
    # An input with one row may be shared by the rows of the others.
    candidates = [axis for axis in first_axes if sizes[axis][0] > 1] or first_axes
    if not candidates or len({sizes[axis] for axis in candidates}) > 1:
        return None
    one_more = sizes[candidates[0]][0] + 1
    if _answers(run, _with_sizes(sample, dict.fromkeys(candidates, one_more))) is None:
        return None
    return candidates


def _with_sizes(sample: Sample, sizes: Mapping[_Axis, int]) -> dict[str, Tensor]:
    """The sample with other sizes of these axes."""
    # `resized` takes sizes by the names of axes, so each axis gets a unique name.
    axes: dict[str, dict[int, str]] = {name: {} for name in sample}
    sizes_by_name: dict[str, int] = {}
    for (name, index), size in sizes.items():
        axes[name][index] = f"{name}.{index}"
        sizes_by_name[f"{name}.{index}"] = size
    return resized(sample, axes, sizes_by_name)


def _answers(run: Forward, sample: Sample) -> dict[str, Tensor] | None:
    """The answers, or None if the module does not read the sample."""
    try:
        return dict(run(sample))
    except Exception:  # the user's own code, on sizes that the samples do not have
        return None
