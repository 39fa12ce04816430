"""Which batch sizes give a row the bits it has alone. Knows neither ONNX Runtime nor HTTP: it is
given `run`.

A runtime may choose another kernel, and with it another order of additions, for another number of
rows. The measurement is the same for the exporter, who writes it into the certificate, and for the
service, which batches by it.

Shapes: T positions, G ids a position.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from evalmode.bundle.errors import ModelRunFailed
from evalmode.bundle.frontend import FrontEndSpec, Ids, collate
from evalmode.bundle.known_answers import Run, Tensors, bits

_MOST_TIMINGS = (
    5  # of each count: the best of five is what the machine can do when nothing else runs
)


def rows_by_length(
    rows: Sequence[Ids], spec: FrontEndSpec, *, each: int = 8
) -> dict[int, list[Tensors]]:
    """`each` single rows, padded, for every rung of the ladder: half of them full, half of them
    mostly padding.

    Made of real rows, ids (T,) or (T, G), cut or joined until they have the length: real ids at
    lengths that the data may not reach.
    """
    joined = np.concatenate(rows)
    found: dict[int, list[Tensors]] = {}
    for length in spec.lengths:
        starts = [length * index for index in range(each)]
        pieces = [
            np.take(joined, range(start, start + length), axis=0, mode="wrap") for start in starts
        ]
        pieces[1::2] = [
            piece[: max(1, length // (index + 2))] for index, piece in enumerate(pieces[1::2])
        ]
        found[length] = [collate([piece], length=length) for piece in pieces]
    return found


def stack(rows: Sequence[Tensors], *, count: int, first: int = 0) -> dict[str, np.ndarray]:
    """One batch of `count` rows, taken in turn from `rows` (each with a leading dimension of 1),
    from `first` on.
    """
    chosen = [rows[(first + place) % len(rows)] for place in range(count)]
    return {name: np.concatenate([row[name] for row in chosen]) for name in rows[0]}


def stable_row_counts(run: Run, rows: Sequence[Tensors], counts: Sequence[int]) -> tuple[int, ...]:
    """Those of `counts` at which every row gives, in every place of the batch, the bits it gives
    alone.

    `rows` are single rows of one padded length. One row alone is the reference, so 1 is always
    stable unless `run` does not repeat itself.
    """
    alone = [run(row) for row in rows]
    return tuple(count for count in counts if _best_stable_s(run, rows, alone, count) is not None)


def timed_row_counts(
    run: Run, rows: Sequence[Tensors], counts: Sequence[int], *, budget_s: float
) -> dict[int, float]:
    """The same, each with the seconds of its fastest run.

    The first of `counts` is always measured; what is not begun within `budget_s` is left out, for
    it is not proven, and so is what fails, as a batch does that is too large for the memory. Time
    that is left is spent on timing again, all counts in turn, so that a disturbance hits none of
    them alone.
    """
    until = time.monotonic() + budget_s
    alone = [run(row) for row in rows]
    best_s: dict[int, float] = {}
    for measured, count in enumerate(counts):
        if measured and time.monotonic() >= until:
            break
        try:
            found_s = _best_stable_s(run, rows, alone, count)
        except ModelRunFailed:
            break
        if found_s is not None:
            best_s[count] = found_s
    for again in range(_MOST_TIMINGS - 1):
        for count in best_s:
            if time.monotonic() + best_s[count] >= until:
                return best_s
            best_s[count] = min(
                best_s[count], _timed(run, stack(rows, count=count, first=again))[1]
            )
    return best_s


def _best_stable_s(
    run: Run, rows: Sequence[Tensors], alone: Sequence[Tensors], count: int
) -> float | None:
    """The seconds of the fastest of some runs with `count` rows; None when a row has other bits
    there than alone.
    """
    best_s = math.inf
    # A batch is as many places as rows; starting at another row puts other companions around each.
    for first in {0, len(rows) // 2}:
        batch, seconds = _timed(run, stack(rows, count=count, first=first))
        best_s = min(best_s, seconds)
        for place in range(count):
            expected = alone[(first + place) % len(rows)]
            if any(
                not _same(batch[name][place : place + 1], tensor)
                for name, tensor in expected.items()
            ):
                return None
    return best_s


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and bits(one) == bits(other)


def _timed(run: Run, inputs: Tensors) -> tuple[Tensors, float]:
    began = time.perf_counter()
    return run(inputs), time.perf_counter() - began
