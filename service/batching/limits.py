"""What the engine may hold, what it holds now, and how fast its queue empties.

`Queue.admit` in queue.py refuses the requests that do not fit, and has the sentence of the error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

# The weight of the older batches is multiplied by this at each new batch, so after some twenty
# batches one counts for a tenth. The estimate follows a machine that gets slower, but not a single
# slow batch.
_DECAY = 0.9
# Clients that are told a longer time would stay away long after the load has changed.
_LONGEST_RETRY_S = 60


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine may hold and how long rows may wait.

    Attributes:
        queue_rows: rows that may wait.
        queue_bytes: bytes that the waiting rows may hold.
        queue_s: estimated seconds that a new row may have to wait. An empty queue always admits.
        max_run_s: a run that takes longer counts as stuck.
        patience_s: rows that arrive this much later never run before a row, whatever their
            deadlines.
    """

    queue_rows: int = 4096
    queue_bytes: int = 64 << 20
    queue_s: float = math.inf
    max_run_s: float = 30.0
    patience_s: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            # NaN is refused too, since it is not above 0.
            if not value > 0:
                raise ValueError(f"{field.name} is {value}: it must be above 0")


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the engine holds now. A proof does not count as a running batch."""

    waiting_rows: int
    waiting_bytes: int
    running_batches: int
    parallel: int


class DrainRate:
    """Estimates the seconds per row under load from the newest batches, and so how long the waiting
    rows will take.

    Every batch counts that ran while other rows waited. A batch without waiting rows is only an
    upper bound: on an idle machine one row may cost as much as thirty together. It counts only if
    its rows were faster than the estimate. Without that, one slow batch could keep all rows out,
    and no later batch would correct the estimate.
    """

    def __init__(self, *, parallel: int) -> None:
        self._parallel = parallel
        # Sums over the batches, each weighted by its age.
        self._rows = 0.0
        self._run_s = 0.0

    @property
    def is_known(self) -> bool:
        """Whether a batch has run: then the assumed seconds per row do not count."""
        return self._rows > 0

    def record(self, *, rows: int, run_s: float, under_load: bool = True) -> None:
        """A batch of `rows` rows ran for `run_s` seconds; `under_load` if other rows waited."""
        # Seconds per row, compared without a division: no batch may have been recorded yet.
        if not under_load and run_s * self._rows >= self._run_s * rows:
            return
        self._rows = self._rows * _DECAY + rows
        self._run_s = self._run_s * _DECAY + run_s

    def wait_s(self, rows: int, *, assumed_row_s: float) -> float:
        """Seconds until `rows` rows have run. Before the first batch `assumed_row_s` counts."""
        row_s = self._run_s / self._rows if self.is_known else assumed_row_s
        return rows * row_s / self._parallel

    def retry_after_s(self, rows: int, *, assumed_row_s: float) -> int:
        """The same in whole seconds, from 1 to 60, for a client that is refused."""
        wait_s = self.wait_s(rows, assumed_row_s=assumed_row_s)
        return min(_LONGEST_RETRY_S, max(1, math.ceil(wait_s)))
