"""How fast the queue drains, measured on its batches. Knows no queue and no clock."""

from __future__ import annotations

import math

# What is left of the weight of a batch when the next one comes: some twenty batches forget what was
# before.
_KEPT = 0.9
_LONGEST_S = 60


class Drain:
    """Seconds that a row takes under load, over the newest batches, and how long so many rows will
    take.

    Batches that left rows waiting count. Of the others only those do in which a row took less than
    is believed: one row alone on an idle machine may cost as much as thirty together, so it says at
    most how slowly a burst would drain. But that it does say: where the belief itself keeps rows
    out, as after a batch that was held up, none is left waiting.
    """

    def __init__(self, *, parallel: int) -> None:
        self._parallel = parallel
        self._rows = 0.0
        self._run_s = 0.0

    def record(self, *, rows: int, run_s: float, pressed: bool = True) -> None:
        """A batch of `rows` rows ran for `run_s`; `pressed` is whether it left others waiting."""
        if not pressed and run_s * self._rows >= self._run_s * rows:
            return
        self._rows = self._rows * _KEPT + rows
        self._run_s = self._run_s * _KEPT + run_s

    def wait_s(self, rows: int, *, assumed_row_s: float) -> float:
        """Seconds until `rows` rows have run; before the first batch by `assumed_row_s`."""
        row_s = self._run_s / self._rows if self._rows else assumed_row_s
        return rows * row_s / self._parallel

    def retry_after_s(self, rows: int, *, assumed_row_s: float) -> int:
        """The same in whole seconds, 1 to 60, as a refused client is told."""
        return min(_LONGEST_S, max(1, math.ceil(self.wait_s(rows, assumed_row_s=assumed_row_s))))
