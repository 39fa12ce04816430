"""How fast the queue drains, measured on the batches that ran. Knows no queue and no clock."""

from __future__ import annotations

import math

# Of the newest batch: some twenty batches forget what was before, a single slow one shifts it little.
_WEIGHT = 0.1
_LONGEST_S = 60


class Drain:
    """Seconds that a row takes, as a moving average over batches, and when so many rows should have run."""

    def __init__(self, *, parallel: int) -> None:
        self._parallel = parallel
        self._row_s: float | None = None

    def record(self, *, rows: int, run_s: float) -> None:
        """A batch of `rows` rows ran for `run_s`."""
        row_s = run_s / rows
        self._row_s = row_s if self._row_s is None else self._row_s + _WEIGHT * (row_s - self._row_s)

    def retry_after_s(self, rows: int, *, assumed_row_s: float) -> int:
        """Whole seconds, 1 to 60, until `rows` rows have run; before the first batch by `assumed_row_s`."""
        row_s = assumed_row_s if self._row_s is None else self._row_s
        return min(_LONGEST_S, max(1, math.ceil(rows * row_s / self._parallel)))
