"""Measure at which batch sizes a row has the bits that it has alone.

For another number of rows a runtime may choose another kernel, which may add in another order. The
exporter writes the result into the certificate, and the service uses only these batch sizes. Both
pass `run`, which computes a batch.

Shapes: B rows, T positions, G ids per position.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence

import numpy as np

from evalmode.bundle.errors import ModelRunFailed
from evalmode.bundle.frontend import FrontEndSpec, Ids, collate
from evalmode.bundle.known_answers import Run, Tensors, bits

# Timings of each row count. The best of five is close to the speed of a machine without other load.
_MAX_TIMINGS = 5


def rows_by_length(
    rows: Sequence[Ids], spec: FrontEndSpec, *, each: int = 8
) -> dict[int, list[Tensors]]:
    """Single rows to measure with: `each` for every length of the ladder, padded to it.

    `rows` are ids (T,) or (T, G) of real texts. They are joined and cut, so that there are rows of
    real ids at lengths that no text has. Every second row is mostly padding.
    """
    ids = np.concatenate(rows)
    padded_rows: dict[int, list[Tensors]] = {}
    for length in spec.lengths:
        padded_rows[length] = []
        for index in range(each):
            start = length * index
            piece = np.take(ids, range(start, start + length), axis=0, mode="wrap")
            # 1/2, 1/3, 1/4, ... of the length in the second, fourth, sixth, ... row.
            if index % 2 == 1:
                piece = piece[: max(1, length // (index // 2 + 2))]
            padded_rows[length].append(collate([piece], length=length))
    return padded_rows


def stack(rows: Sequence[Tensors], *, count: int, first: int = 0) -> dict[str, np.ndarray]:
    """One batch of `count` rows: `rows` in turn from index `first` on, repeated as needed.

    Each row has a leading dimension of 1, and the batch one of `count`.
    """
    batch_rows = [rows[(first + index) % len(rows)] for index in range(count)]
    return {name: np.concatenate([row[name] for row in batch_rows]) for name in rows[0]}


def stable_row_counts(run: Run, rows: Sequence[Tensors], counts: Sequence[int]) -> tuple[int, ...]:
    """The counts at which every row has the bits that it has alone, at every position of the batch.

    `rows` are single rows of the same padded length. A row alone is the reference, so 1 is stable
    unless `run` itself does not repeat its bits.
    """
    outputs_alone = [run(row) for row in rows]
    return tuple(
        count for count in counts if _best_stable_s(run, rows, outputs_alone, count) is not None
    )


def timed_row_counts(
    run: Run,
    rows: Sequence[Tensors],
    counts: Sequence[int],
    *,
    budget_s: float,
    well_timed: Collection[int] = (),
) -> dict[int, float]:
    """The stable ones of `counts`, each with the seconds of its fastest run.

    Counts that are `well_timed` already run no more often than their proof needs.

    The first count is always measured. The measurement ends when `budget_s` has passed, and at a
    count whose run fails: a batch may be too large for the memory. The remaining counts are not
    proven, and are left out.
    """
    deadline = time.monotonic() + budget_s
    outputs_alone = [run(row) for row in rows]
    best_s: dict[int, float] = {}
    for index, count in enumerate(counts):
        if index > 0 and time.monotonic() >= deadline:
            break
        try:
            count_s = _best_stable_s(run, rows, outputs_alone, count)
        except ModelRunFailed:
            break
        if count_s is not None:
            best_s[count] = count_s

    # The rest of the budget improves the timings. All counts take turns, so that a busy moment of
    # the machine does not slow down only one of them.
    badly_timed = [count for count in best_s if count not in well_timed]
    for first in range(_MAX_TIMINGS - 1):
        for count in badly_timed:
            if time.monotonic() + best_s[count] >= deadline:
                return best_s
            _, seconds = _timed(run, stack(rows, count=count, first=first))
            best_s[count] = min(best_s[count], seconds)
    return best_s


def _best_stable_s(
    run: Run, rows: Sequence[Tensors], outputs_alone: Sequence[Tensors], count: int
) -> float | None:
    """The seconds of the fastest of the runs with `count` rows.

    None when a row has other bits there than alone.
    """
    best_s = math.inf
    # Two batches that begin at other rows: each row has other neighbours, in another position.
    for first in {0, len(rows) // 2}:
        outputs, seconds = _timed(run, stack(rows, count=count, first=first))
        best_s = min(best_s, seconds)
        for position in range(count):
            for name, expected in outputs_alone[(first + position) % len(rows)].items():
                actual = outputs[name][position : position + 1]
                if actual.shape != expected.shape or bits(actual) != bits(expected):
                    return None
    return best_s


def _timed(run: Run, inputs: Tensors) -> tuple[Tensors, float]:
    began = time.perf_counter()
    return run(inputs), time.perf_counter() - began
