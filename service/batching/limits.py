"""What the engine may hold, and what it holds. Knows nothing of how it does."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine holds and how long it waits.

    Attributes:
        queue_rows: rows that may wait.
        queue_bytes: bytes that the waiting rows may hold.
        queue_s: seconds that a row may have to wait, as far as can be told; who comes when nothing
            waits is let in.
        max_run_s: a run beyond this counts as stuck.
        patience_s: no batch goes before a row all of whose own rows came so much later than it.
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
    """What the engine holds now; a proof is no running batch."""

    waiting_rows: int
    waiting_bytes: int
    running_batches: int
    parallel: int
