"""Make more inputs from a sample: of other sizes, and with other values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from evalmode.export.inputs.axes import BATCH, Axes, Sample, sizes_of

# Whole numbers between the smallest and the largest of a sample are listed up to this many, which
# is 8 MiB of int64.
_LISTED_NUMBERS = 1 << 20


def resized(
    sample: Sample, axes: Axes, sizes: Mapping[str, int], *, repeat: bool = False
) -> dict[str, Tensor]:
    """The sample with other sizes of the named axes: cut at the end, or continued.

    More rows repeat the rows, and a longer mask repeats itself. Everything else is continued with
    numbers that are not in the tensor yet, because runtimes choose differently among equal scores
    (top-k, argmax). With `repeat` it repeats itself too.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in sample.items():
        result = tensor
        for index, axis in axes.get(name, {}).items():
            if axis not in sizes:
                continue
            old_size, new_size = result.shape[index], sizes[axis]
            positions = torch.arange(new_size) % max(1, old_size)
            result = result.index_select(index, positions)
            if new_size > old_size and axis != BATCH and not repeat and not _is_mask(tensor):
                added = result.narrow(index, old_size, new_size - old_size)
                added.copy_(_new_numbers(tensor, added.shape))
        tensors[name] = result.contiguous()
    return tensors


def boundary_sizes(sample: Sample, axes: Axes) -> Iterator[dict[str, int]]:
    """Sizes, by axis, that reach the ends of each axis and go beyond the sample.

    For the batch 1, 2, 5 and 65 rows; for another axis 1, 2, half of it, one less and twice.
    """
    sizes = sizes_of(sample, axes)
    if BATCH in sizes:
        for rows in (1, 2, 5, 65):
            yield {BATCH: rows}
    for axis, size in sizes.items():
        if axis == BATCH:
            continue
        for boundary in sorted({1, 2, max(1, size // 2), max(1, size - 1), 2 * size} - {size}):
            yield {axis: boundary}
            if BATCH in sizes:
                yield {axis: boundary, BATCH: 1}


def resampled(sample: Sample, seed: int) -> dict[str, Tensor]:
    """The sample with other values: each tensor's elements in another order.

    So ids remain ids, and ranges stay the same. A mask stays as it is, because networks are not
    made for a row in which everything is masked. Each row of floats is scaled down by a random
    factor, which makes numbers and magnitudes that the sample does not hold.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, tensor in sample.items():
        if _is_mask(tensor) or tensor.numel() == 0:
            tensors[name] = tensor
            continue
        order = torch.randperm(tensor.numel(), generator=generator)
        shuffled = tensor.reshape(-1)[order].reshape(tensor.shape)
        if tensor.is_floating_point():
            # A sample of equal numbers, such as ones, is a placeholder for any numbers.
            if bool((tensor == tensor.reshape(-1)[0]).all()):
                noise = torch.randn(tensor.shape, generator=generator)
                shuffled = shuffled + noise.to(tensor.dtype)
            rows = [tensor.shape[0], *[1] * (tensor.ndim - 1)] if tensor.ndim else []
            factor = 0.1 + 0.9 * torch.rand(rows, generator=generator)
            shuffled = shuffled * factor.to(tensor.dtype)
        tensors[name] = shuffled.contiguous()
    return tensors


def keeps_masks(sample: Sample, changed: Sample) -> bool:
    """Whether masks without an empty row in `sample` have none in `changed` either."""
    for name, tensor in sample.items():
        if not _is_mask(tensor) or not bool(tensor.any(-1).all()):
            continue
        if not bool(changed[name].any(-1).all()):
            return False
    return True


def _is_mask(tensor: Tensor) -> bool:
    """Whether a tensor holds zeros and ones only; for floats, zeros and one other number."""
    if tensor.ndim == 0 or tensor.numel() == 0:
        return False
    if not tensor.is_floating_point():
        return bool(((tensor == 0) | (tensor == 1)).all())
    nonzero = tensor[tensor != 0]
    return 0 < nonzero.numel() < tensor.numel() and bool((nonzero == nonzero[0]).all())


def _new_numbers(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Numbers of `shape` that `tensor` could hold and, where possible, does not hold.

    Floats are numbers of the tensor, each made smaller by at most one per cent. Whole numbers lie
    between its smallest and its largest, and those that it does not hold come first.
    """
    generator = torch.Generator().manual_seed(tensor.numel())
    numbers, count = tensor.reshape(-1), torch.Size(shape).numel()
    if tensor.is_floating_point():
        drawn = numbers[torch.randint(numbers.numel(), (count,), generator=generator)].double()
        # A sample of equal numbers, such as ones, is a placeholder for any numbers.
        if bool((numbers == numbers[0]).all()):
            drawn = drawn + torch.randn(count, generator=generator)
        factor = 1 - 0.01 * torch.rand(count, generator=generator, dtype=torch.float64)
        return (drawn * factor).to(tensor.dtype).reshape(shape)
    smallest, largest = int(numbers.min()), int(numbers.max())
    choices = numbers
    if tensor.dtype != torch.bool and largest - smallest < _LISTED_NUMBERS:
        order = torch.randperm(largest - smallest + 1, generator=generator)
        between = smallest + order.to(tensor.dtype)
        is_present = torch.isin(between, numbers)
        choices = torch.cat([between[~is_present], between[is_present]])
    return choices[torch.arange(count) % choices.numel()].reshape(shape)
