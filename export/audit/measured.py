"""The figures of one effect, whichever test they come from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from evalmode.export.audit.site import Interval

MOST_DRAWS = 20_000  # forwards of one site in one test


class Outcome(Enum):
    """What the draws say of the gap."""

    NONE = auto()
    GAP = auto()
    UNSURE = auto()
    FROZEN = auto()
    NOTHING_KEPT = auto()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One effect's figures: `value` is what a mask keeps (None: no mask)."""

    outcome: Outcome
    draws: int
    value: float | None = None
    keep: float | None = None
    keep_interval: Interval | None = None
    gap: float | None = None
    gap_interval: Interval | None = None
