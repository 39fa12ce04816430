"""Make the evidence from a few samples: probes of other sizes and values, and single rows.

A `run` function stands for the module or the graph that answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from evalmode.bundle.known_answers import Tensors
from evalmode.export.inputs.axes import BATCH, Axes, Sample, sizes_of
from evalmode.export.inputs.evidence import Companions, Evidence
from evalmode.export.inputs.find_axes import Forward
from evalmode.export.inputs.resize import boundary_sizes, keeps_masks, resampled, resized

# Single rows of each length; batch-invariance exchanges every pair of them.
_ROWS = 8
# Probes with other values than the first sample's.
_RESAMPLED_PROBES = 4


def evidence_of(run: Forward, samples: Sequence[Sample], axes: Axes) -> Evidence:
    """The probes and the rows on which the module or graph is judged that `run` calls."""
    companions = single_rows(run, samples, axes)
    rows = {}
    if companions and can_batch(run, samples[0], axes):
        rows = {length: group.rows for length, group in companions.items()}
        companions = {}
    return Evidence(
        probes=probes(run, samples, axes), rows=rows, companions=companions, dynamic_axes=axes
    )


def probes(run: Forward, samples: Sequence[Sample], axes: Axes) -> list[Tensors]:
    """The samples, and inputs made from them: with sizes at both ends of every axis, and with other
    values.

    An input made here is a probe only if `run` reads it and answers with finite numbers. Otherwise
    it may be outside of the module's domain.
    """
    candidates: list[Sample] = []
    for sample in samples:
        for sizes in boundary_sizes(sample, axes):
            probe = resized(sample, axes, sizes)
            # The module may refuse new numbers and still read numbers of the sample again.
            if not _answers_finite_numbers(run, probe):
                probe = resized(sample, axes, sizes, repeat=True)
            if keeps_masks(sample, probe):
                candidates.append(probe)
    has_rows = BATCH in sizes_of(samples[0], axes)
    for seed in range(_RESAMPLED_PROBES):
        # Every second one also has another number of rows.
        candidate: Sample = resampled(samples[0], seed)
        if has_rows and seed % 2:
            candidate = resized(candidate, axes, {BATCH: 5})
        else:
            candidate = resized(candidate, axes, {})
        candidates.append(candidate)
    readable = [probe for probe in candidates if _answers_finite_numbers(run, probe)]
    return [_as_arrays(probe) for probe in (*samples, *readable)]


def single_rows(run: Forward, samples: Sequence[Sample], axes: Axes) -> dict[int, Companions]:
    """Single rows by their length: the size of the first axis besides the batch, or 0 without one.

    Empty if no input has an axis of rows, or if one has two: then no rows share a batch.
    """
    row_axes: dict[str, int] = {}
    for name, axis_names in axes.items():
        indices = [index for index, axis in axis_names.items() if axis == BATCH]
        if len(indices) > 1:
            return {}
        if indices:
            row_axes[name] = indices[0]
    if not row_axes:
        return {}
    groups: dict[int, Companions] = {}
    for sample in samples:
        sizes = sizes_of(sample, axes)
        length = next((size for axis, size in sizes.items() if axis != BATCH), 0)
        shared = {name: tensor for name, tensor in sample.items() if name not in row_axes}
        batches: list[Sample] = [sample]
        for seed in range(_ROWS):
            other = {**resampled(sample, seed), **shared}
            if _answers_finite_numbers(run, other):
                batches.append(other)
        rows: list[Tensors] = []
        for batch in batches:
            arrays = _as_arrays({name: batch[name] for name in row_axes})
            for index in range(sizes[BATCH]):
                row = {name: arrays[name].take([index], axis) for name, axis in row_axes.items()}
                rows.append(row)
        group = Companions(rows=rows[:_ROWS], axes=row_axes, shared=_as_arrays(shared))
        # If several samples have the same length, the first one counts.
        groups.setdefault(length, group)
    return groups


def can_batch(run: Forward, sample: Sample, axes: Axes) -> bool:
    """Whether a service may batch rows: all inputs and answers have them on the first axis."""
    for name in sample:
        if axes.get(name, {}).get(0) != BATCH:
            return False
    for rows in (2, 3):
        try:
            answers = run(resized(sample, axes, {BATCH: rows})).values()
        except Exception:  # the user's own code: an axis that has one size only is no batch
            return False
        for answer in answers:
            if answer.shape[:1] != (rows,):
                return False
    return True


def _answers_finite_numbers(run: Forward, probe: Sample) -> bool:
    try:
        answers = run(probe)
    except Exception:  # the user's own code or graph, on inputs that were made here
        return False
    return all(bool(torch.isfinite(answer).all()) for answer in answers.values())


def _as_arrays(sample: Sample) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy() for name, tensor in sample.items()}
