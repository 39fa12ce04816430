"""Who is told what the engine does, and how he is told without ever being able to hold it up by an
error.

Knows no queue and no threads; metrics and logs implement `Observer`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal, ParamSpec, Protocol

from evalmode.service.batching.bucket import Bucket, Row
from evalmode.service.batching.proof import Violation

Reason = Literal["queue_full", "deadline", "cancelled", "failed"]

P = ParamSpec("P")

_log = logging.getLogger(__name__)


class Observer(Protocol):
    """Told from engine threads and the event loop, with no lock held; must be quick and never
    raise.

    Who inherits from it says only what he has something to say of: a method that is left out says
    nothing.
    """

    def batch_ran(
        self,
        bucket: Bucket,
        rows: Sequence[Row],
        *,
        places: int,
        waited_s: Sequence[float],
        run_s: float,
    ) -> None:
        """A batch of `rows` was answered in `run_s`, filled with copies up to `places`; each row
        had waited so long.
        """
        return

    def rows_dropped(self, reason: Reason, bucket: Bucket, rows: int) -> None:
        """A request will not be answered: told once for each of its buckets, with all the rows it
        had there.
        """
        return

    def proved(self, bucket: Bucket, violation: Violation | None) -> None:
        """A row was run again alone; `violation` when its answer was another one."""
        return


def tell(say: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call a method of an observer; its error is logged and goes no further."""
    try:
        say(*args, **kwargs)
    except Exception:  # an engine thread that died of it would leave its callers waiting
        _log.exception("an observer of the engine failed")
