"""The inputs on which anything is judged that came with a few samples: other sizes, other values,
single rows.

Knows no module, no rule and no ONNX: it is given `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from evalmode.bundle.known_answers import Tensors
from evalmode.export.inputs.axes import (
    BATCH,
    Axes,
    Sample,
    ends,
    infer_axes,
    keeps_masks,
    resampled,
    resized,
    sizes_of,
)

# Answers by name; raises whatever it likes on inputs that it does not read.
Run: TypeAlias = Callable[[Sample], Mapping[str, Tensor]]

_ROWS = 8
_RESAMPLED = 4


def inferred_axes(run: Run, samples: Sequence[Sample]) -> Axes:
    """The axes that the samples show to vary; no batch where another number of rows is refused: it
    was a guess.
    """
    axes = infer_axes(samples)
    rows = sizes_of(samples[0], axes).get(BATCH)
    if rows is None or len({sizes_of(sample, axes)[BATCH] for sample in samples}) > 1:
        return axes
    try:
        run(resized(samples[0], axes, {BATCH: rows + 1}))
    except Exception:  # the user's own code
        return {
            name: {at: axis for at, axis in places.items() if axis != BATCH}
            for name, places in axes.items()
        }
    return axes


def probes(run: Run, samples: Sequence[Sample], axes: Axes) -> list[Tensors]:
    """The samples, then what is made of them: both ends of every axis, and other values.

    Of what is made, those that `run` reads and answers with numbers: the others may be outside of
    its domain.
    """
    made: list[Sample] = []
    for sample in samples:
        made += [probe for probe in list(ends(sample, axes))[1:] if keeps_masks(sample, probe)]
    rows = {BATCH: 5} if BATCH in sizes_of(samples[0], axes) else {}
    made += [
        resized(resampled(samples[0], seed), axes, rows if seed % 2 else {})
        for seed in range(_RESAMPLED)
    ]
    return [_arrays(probe) for probe in (*samples, *_that_run(run, made))]


def single_rows(run: Run, samples: Sequence[Sample], axes: Axes) -> dict[int, list[Tensors]]:
    """Single rows by the size of the first axis beside the batch (0 where none varies).

    None where an input has no batch axis, or an answer has not one row for each row.
    """
    if not all(axes.get(name, {}).get(0) == BATCH for name in samples[0]):
        return {}
    if not all(_keeps_rows(run, resized(samples[0], axes, {BATCH: rows}), rows) for rows in (2, 3)):
        return {}
    found: dict[int, list[Tensors]] = {}
    for sample in samples:
        length = next((size for axis, size in sizes_of(sample, axes).items() if axis != BATCH), 0)
        pool = [sample, *_that_run(run, [resampled(sample, seed) for seed in range(_ROWS)])]
        single: list[Tensors] = [
            {name: array[place : place + 1] for name, array in _arrays(one).items()}
            for one in pool
            for place in range(next(iter(sample.values())).shape[0])
        ]
        found.setdefault(length, single[:_ROWS])
    return found


def _keeps_rows(run: Run, batch: Sample, rows: int) -> bool:
    try:
        answers = run(batch).values()
    except Exception:
        # The user's own code: what it takes another number of rows for is no batch axis.
        return False
    return all(answer.ndim and answer.shape[0] == rows for answer in answers)


def _that_run(run: Run, made: Sequence[Sample]) -> list[Sample]:
    return [probe for probe in made if _is_finite(run, probe)]


def _is_finite(run: Run, probe: Sample) -> bool:
    try:
        answers = run(probe)
    except Exception:  # the user's own code or graph, on inputs that he did not give
        return False
    return all(bool(torch.isfinite(answer).all()) for answer in answers.values())


def _arrays(sample: Sample) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy() for name, tensor in sample.items()}
