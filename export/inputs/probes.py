"""The inputs on which anything is judged that came with a few samples: other sizes, other values,
single rows.

Knows no module, no rule and no ONNX: it is given `run`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from evalmode.bundle.known_answers import Tensors
from evalmode.export.inputs.axes import (
    BATCH,
    Axes,
    Run,
    Sample,
    ends,
    keeps_masks,
    resampled,
    resized,
    sizes_of,
)
from evalmode.export.inputs.evidence import Companions, Evidence

_ROWS = 8
_RESAMPLED = 4


def probes(run: Run, samples: Sequence[Sample], axes: Axes) -> list[Tensors]:
    """The samples, then what is made of them: both ends of every axis, and other values.

    Of what is made, those that `run` reads and answers with numbers: the others may be outside of
    its domain. Where it does not read a sample that is continued by other numbers, it may read one
    that is continued by itself.
    """
    made: list[Sample] = []
    for sample in samples:
        for sizes in ends(sample, axes):
            probe = resized(sample, axes, sizes)
            if not _is_finite(run, probe):
                probe = resized(sample, axes, sizes, repeat=True)
            if keeps_masks(sample, probe):
                made.append(probe)
    rows = {BATCH: 5} if BATCH in sizes_of(samples[0], axes) else {}
    made += [
        resized(resampled(samples[0], seed), axes, rows if seed % 2 else {})
        for seed in range(_RESAMPLED)
    ]
    return [_arrays(probe) for probe in (*samples, *_that_run(run, made))]


def single_rows(run: Run, samples: Sequence[Sample], axes: Axes) -> dict[int, Companions]:
    """Single rows by the size of the first axis beside the batch (0 where none varies).

    Empty where no input has an axis of rows, or one has it twice: nothing shares a batch then.
    """
    places = {
        name: [place for place, axis in named.items() if axis == BATCH]
        for name, named in axes.items()
    }
    if not any(places.values()) or any(len(batch) > 1 for batch in places.values()):
        return {}
    row_axes = {name: batch[0] for name, batch in places.items() if batch}
    groups: dict[int, Companions] = {}
    for sample in samples:
        sizes = sizes_of(sample, axes)
        length = next((size for axis, size in sizes.items() if axis != BATCH), 0)
        shared = {name: tensor for name, tensor in sample.items() if name not in row_axes}
        others = [{**resampled(sample, seed), **shared} for seed in range(_ROWS)]
        rows: list[Tensors] = []
        for batch in (sample, *_that_run(run, others)):
            arrays = _arrays({name: batch[name] for name in row_axes})
            rows += [
                {name: arrays[name].take([index], axis) for name, axis in row_axes.items()}
                for index in range(sizes[BATCH])
            ]
        groups.setdefault(
            length, Companions(rows=rows[:_ROWS], axes=row_axes, shared=_arrays(shared))
        )
    return groups


def can_batch(run: Run, sample: Sample, axes: Axes) -> bool:
    """Whether a service may batch rows: all inputs and answers have them on the first axis."""
    if not all(axes.get(name, {}).get(0) == BATCH for name in sample):
        return False
    for rows in (2, 3):
        try:
            answers = run(resized(sample, axes, {BATCH: rows})).values()
        except Exception:
            # The user's own code: what it takes another number of rows for is no batch axis.
            return False
        if not all(answer.ndim and answer.shape[0] == rows for answer in answers):
            return False
    return True


def evidence_of(run: Run, samples: Sequence[Sample], axes: Axes) -> Evidence:
    """The probes and the rows on which what `run` runs is judged."""
    companions = single_rows(run, samples, axes)
    rows = {}
    if companions and can_batch(run, samples[0], axes):
        rows = {length: group.rows for length, group in companions.items()}
    return Evidence(
        probes=probes(run, samples, axes),
        rows=rows,
        companions={} if rows else companions,
        dynamic_axes=axes,
    )


def _that_run(run: Run, made: Sequence[Sample]) -> list[Sample]:
    return [probe for probe in made if _is_finite(run, probe)]


def _is_finite(run: Run, probe: Sample) -> bool:
    try:
        answers = run(probe)
    except Exception:  # the user's own code or graph, on inputs that were made here
        return False
    return all(bool(torch.isfinite(answer).all()) for answer in answers.values())


def _arrays(sample: Sample) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy() for name, tensor in sample.items()}
