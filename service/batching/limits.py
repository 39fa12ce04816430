"""What the engine may hold, what it holds, and how fast it empties."""

from __future__ import annotations

import math
from dataclasses import dataclass

# The weight that older batches keep at each new batch: after some twenty batches they hardly count.
_DECAY = 0.9
_LONGEST_RETRY_S = 60


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine may hold and how long rows may wait.

    Attributes:
        queue_rows: rows that may wait.
        queue_bytes: bytes that the waiting rows may hold.
        queue_s: estimated seconds that a new row may have to wait; an empty queue always admits.
        max_run_s: a run beyond this counts as stuck.
        patience_s: no batch goes before a row if all rows of that batch came this much later.
    """

    queue_rows: int = 4096
    queue_bytes: int = 64 << 20
    queue_s: float = math.inf
    max_run_s: float = 30.0
    patience_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("queue_rows", "queue_bytes", "queue_s", "max_run_s", "patience_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the engine holds now; a proof does not count as a running batch."""

    waiting_rows: int
    waiting_bytes: int
    running_batches: int
    parallel: int


class DrainRate:
    """Seconds per row under load, over the newest batches, and how long waiting rows will take.

    Batches that left rows waiting count. Other batches count only when their rows were faster than
    the estimate: one row alone on an idle machine may cost as much as thirty together, so it gives
    only an upper bound. That bound is needed: after one slow batch the estimate itself may keep all
    rows out, and then no batch leaves rows waiting.
    """

    def __init__(self, *, parallel: int) -> None:
        self._parallel = parallel
        self._rows = 0.0
        self._run_s = 0.0

    def record(self, *, rows: int, run_s: float, pressed: bool = True) -> None:
        """A batch of `rows` rows ran for `run_s`; `pressed` is whether it left others waiting."""
        if not pressed and run_s * self._rows >= self._run_s * rows:
            return
        self._rows = self._rows * _DECAY + rows
        self._run_s = self._run_s * _DECAY + run_s

    def wait_s(self, rows: int, *, assumed_row_s: float) -> float:
        """Seconds until `rows` rows have run; before the first batch by `assumed_row_s`."""
        row_s = self._run_s / self._rows if self._rows else assumed_row_s
        return rows * row_s / self._parallel

    def retry_after_s(self, rows: int, *, assumed_row_s: float) -> int:
        """The same in whole seconds, 1 to 60, for a client that is refused."""
        wait_s = self.wait_s(rows, assumed_row_s=assumed_row_s)
        return min(_LONGEST_RETRY_S, max(1, math.ceil(wait_s)))
