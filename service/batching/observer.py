"""What the engine reports to metrics, statistics, traces and logs.

An observer that raises is logged and never stops the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, ParamSpec, Protocol

if TYPE_CHECKING:
    # A supervisor logs, and needs no NumPy.
    from evalmode.service.batching.bucket import Bucket, Row
    from evalmode.service.batching.proof import Violation

# Why rows are dropped, as metrics name it.
Reason = Literal["queue_full", "deadline", "cancelled", "failed"]

P = ParamSpec("P")

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class RanBatch:
    """A batch that was answered.

    Attributes:
        bucket: the bucket of its rows, or of the longest of them.
        rows: its rows, without the copies that filled it.
        size: the number of rows that it ran with, copies included.
        waited_s: seconds that each of `rows` waited for the batch.
        run_s: seconds that the model ran.
    """

    bucket: Bucket
    rows: Sequence[Row]
    size: int
    waited_s: Sequence[float]
    run_s: float


class Observer(Protocol):
    """Called from engine threads and from the event loop, with no lock held. It must be quick.

    A subclass overrides the methods that it needs; the others do nothing.
    """

    def batch_ran(self, batch: RanBatch) -> None:
        """A batch was answered."""
        return

    def rows_dropped(self, reason: Reason, bucket: Bucket, rows: int) -> None:
        """A request will not be answered. Called for each of its buckets, with the number of its
        rows there.
        """
        return

    def proved(self, bucket: Bucket, violation: Violation | None) -> None:
        """A row was run again alone; `violation` is set if its answer differed."""
        return


def notify(method: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call a method of an observer; log its error instead of raising it."""
    try:
        method(*args, **kwargs)
    except Exception:
        # An error would end the engine thread, and the callers of its batch would wait forever.
        _log.exception("an observer of the engine failed")
