"""Which batch sizes may run, measured when a model is loaded. Knows no HTTP and no runtime: it is given `run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evalmode.bundle.errors import BundleError
from evalmode.bundle.frontend import FrontEnd, Ids, collate
from evalmode.bundle.known_answers import KnownAnswer, Run, Tensors
from evalmode.bundle.row_counts import stable_row_counts

ROW_COUNTS = (1, 2, 4, 8, 16, 32)

# A start must stay short: what a slow model could not prove in this time it does not batch.
_BUDGET_S = 0.3

_ROWS = 3  # of each length: one full, two of them shorter
_FALLBACK = ("A text to measure with, where the bundle holds none of its own.", "1")


def rows_to_measure(answers: Sequence[KnownAnswer], *, frontend: FrontEnd) -> dict[int, list[Tensors]]:
    """A few rows for every padded length, as the model's inputs, made of the ids of the known answers' texts."""
    texts = [answer.text for answer in answers if answer.text is not None] or list(_FALLBACK)
    ids = np.concatenate([frontend.encode(text).ids for text in texts])  # one long row, (positions, ...)
    rows: dict[int, list[Tensors]] = {}
    shortest = 1
    for length in frontend.spec.lengths:
        lengths = np.linspace(length, shortest, _ROWS).astype(int)
        rows[length] = [collate([_taken(ids, place, size)], length=length) for place, size in enumerate(lengths)]
        shortest = length + 1
    return rows


def measure_row_counts(run: Run, rows: Mapping[int, Sequence[Tensors]], *, path: Path) -> dict[int, tuple[int, ...]]:
    """For each padded length, those of ROW_COUNTS at which a row has the bits it has alone.

    Raises BundleError when one row alone does not repeat its own bits.
    """
    budget_s = _BUDGET_S / len(rows)
    found = {length: stable_row_counts(run, some, ROW_COUNTS, budget_s=budget_s) for length, some in rows.items()}
    for length, counts in found.items():
        if 1 not in counts:
            raise BundleError(
                f"{path} gives one row of {length} positions other bits each time it runs: this model or this "
                "execution provider is not deterministic, and nothing it answers could be relied on"
            )
    return found


def _taken(ids: Ids, place: int, size: int) -> Ids:
    """`size` positions of `ids`, from another beginning for another `place`, starting over where they end."""
    first = place * len(ids) // _ROWS
    return ids[np.arange(first, first + size) % len(ids)]
