"""How fast the queue drains, measured on the batches that left rows waiting. Knows no queue and no clock."""

from __future__ import annotations

import math

# What is left of the weight of a batch when the next one comes: some twenty batches forget what was before.
_KEPT = 0.9
_LONGEST_S = 60


class Drain:
    """Seconds that a row takes under load, over the newest batches, and how long so many rows will take.

    Only batches that left rows waiting count: one row alone on an idle machine may cost as much as thirty together, and
    says nothing of how fast a burst would drain.
    """

    def __init__(self, *, parallel: int) -> None:
        self._parallel = parallel
        self._rows = 0.0
        self._run_s = 0.0

    def record(self, *, rows: int, run_s: float) -> None:
        """A batch of `rows` rows, that left others waiting, ran for `run_s`."""
        self._rows = self._rows * _KEPT + rows
        self._run_s = self._run_s * _KEPT + run_s

    def wait_s(self, rows: int, *, assumed_row_s: float) -> float:
        """Seconds until `rows` rows have run; before the first batch by `assumed_row_s`."""
        row_s = self._run_s / self._rows if self._rows else assumed_row_s
        return rows * row_s / self._parallel

    def retry_after_s(self, rows: int, *, assumed_row_s: float) -> int:
        """The same in whole seconds, 1 to 60, as a refused client is told."""
        return min(_LONGEST_S, max(1, math.ceil(self.wait_s(rows, assumed_row_s=assumed_row_s))))
