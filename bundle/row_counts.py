"""Which batch sizes give a row the bits it has alone. Knows neither ONNX Runtime nor HTTP: it is given `run`.

A runtime may choose another kernel, and with it another order of additions, for another number of rows. The measurement
is the same for the exporter, who writes it into the certificate, and for the service, which batches by it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from evalmode.bundle.known_answers import Run, Tensors


def stack(rows: Sequence[Tensors], *, count: int, first: int = 0) -> dict[str, np.ndarray]:
    """One batch of `count` rows, taken in turn from `rows` (each with a leading dimension of 1), from `first` on."""
    chosen = [rows[(first + place) % len(rows)] for place in range(count)]
    return {name: np.concatenate([row[name] for row in chosen]) for name in rows[0]}


def stable_row_counts(
    run: Run, rows: Sequence[Tensors], counts: Sequence[int], *, budget_s: float = math.inf
) -> tuple[int, ...]:
    """Those of `counts` at which every row gives, in every place of the batch, the bits it gives alone.

    `rows` are single rows of one padded length. One row alone is the reference, so 1 is always stable unless `run`
    does not repeat itself. The first of `counts` is always measured; what is not begun within `budget_s` is left out,
    for it is not proven.
    """
    until = time.monotonic() + budget_s
    alone = [run(row) for row in rows]
    stable = []
    for measured, count in enumerate(counts):
        if measured and time.monotonic() >= until:
            break
        if _stable(run, rows, alone, count):
            stable.append(count)
    return tuple(stable)


def _stable(run: Run, rows: Sequence[Tensors], alone: Sequence[Tensors], count: int) -> bool:
    # A batch is as many places as rows; starting at another row puts other companions around each.
    for first in {0, len(rows) // 2}:
        batch = run(stack(rows, count=count, first=first))
        for place in range(count):
            expected = alone[(first + place) % len(rows)]
            if any(batch[name][place].tobytes() != tensor[0].tobytes() for name, tensor in expected.items()):
                return False
    return True
