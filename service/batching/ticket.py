"""One request inside the engine: its rows, its answers as they arrive, and its caller.

The caller is woken once, when the outcome is known. A ticket is changed only with the queue's lock
held. Callers are woken without the lock.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple, TypeAlias, cast

from evalmode.service.batching.bucket import Answer, Bucket, Row
from evalmode.service.errors import RequestError

# How a caller waits for its ticket: blocking in a thread, or awaiting in an event loop.
Caller: TypeAlias = threading.Event | asyncio.Future[None]


class Entry(NamedTuple):
    """A row of a request in the queue and in its batch.

    Attributes:
        ticket: the request.
        position: the row's position in the request, from 0.
        row: the row.
        nbytes: the bytes that the row holds. `row.nbytes` may take time to compute.
    """

    ticket: Ticket
    position: int
    row: Row
    nbytes: int


class Part:
    """The rows of one request in one bucket.

    Attributes:
        bucket: the bucket of all its rows.
        rows: the rows that still wait.
        row_count: the number of rows at the start.
        nbytes: the bytes of the rows that still wait.
        order: (urgency, sequence): the lowest goes first. It is unique within a bucket.
        ticket: the request.
    """

    __slots__ = ("bucket", "nbytes", "order", "row_count", "rows", "ticket")

    def __init__(
        self,
        bucket: Bucket,
        rows: Iterable[Entry],
        *,
        order: tuple[float, int],
        ticket: Ticket,
    ) -> None:
        self.bucket = bucket
        self.rows = deque(rows)
        self.row_count = len(self.rows)
        self.nbytes = sum(entry.nbytes for entry in self.rows)
        self.order = order
        self.ticket = ticket


class Ticket:
    """An admitted request. All of it is answered, or all of it fails.

    Attributes:
        arrived: when it arrived, by the engine's clock.
        began: when its latest batch began; None while all its rows wait.
        ended: when it was done; None until then.
        deadline: no row of it may be started after this time; infinite without a deadline.
        caller: the event or future that is set when the ticket is done.
        parts: its rows by bucket; empty once it is done.
        done: whether its caller was woken or is about to be. Later changes are ignored.
        dropped: the number of rows in each bucket, if it failed.
        failure: the error for the caller, if it failed and the caller still waits.
    """

    __slots__ = (
        "_answers",
        "_rows_left",
        "arrived",
        "began",
        "caller",
        "deadline",
        "done",
        "dropped",
        "ended",
        "failure",
        "parts",
    )

    def __init__(self, rows: int, *, arrived: float, deadline: float, caller: Caller) -> None:
        self.arrived = arrived
        self.began: float | None = None
        self.ended: float | None = None
        self.deadline = deadline
        self.caller = caller
        self.parts: tuple[Part, ...] = ()
        self.done = False
        self.dropped: tuple[tuple[Bucket, int], ...] = ()
        self.failure: RequestError | None = None
        self._answers: list[Answer | None] = [None] * rows
        self._rows_left = rows

    def answer(self, position: int, answer: Answer, *, now: float) -> bool:
        """Store the answer of the row at `position`; True if it was the last one."""
        self._answers[position] = answer
        self._rows_left -= 1
        if self._rows_left:
            return False
        self.done = True
        self.ended = now
        # Parts refer to their ticket. Only the garbage collector would free such a cycle.
        self.parts = ()
        return True

    def fail(self, failure: RequestError | None, *, now: float) -> None:
        """End it without answers. `failure` is None if the caller no longer waits."""
        self.done = True
        self.ended = now
        self.failure = failure
        self.dropped = tuple((part.bucket, part.row_count) for part in self.parts)
        self.parts = ()

    def times_s(self) -> tuple[float, float]:
        """Seconds until its latest batch began, and from there to its end.

        Their sum is the time that the request was in the engine.
        """
        assert self.ended is not None, "the ticket is done"
        began = self.ended if self.began is None else self.began
        return began - self.arrived, self.ended - began

    def result(self) -> list[Answer]:
        """The answers in the order of the rows. Raises the failure, if it failed."""
        assert self.done
        if self.failure is None:
            return cast(list[Answer], self._answers)
        failure, self.failure = self.failure, None
        try:
            raise failure
        finally:
            # The traceback of the failure refers to this frame: without `del` they are a cycle.
            del failure


def wake(callers: Iterable[Caller]) -> None:
    """Wake the callers of tickets that are done.

    The callers of one event loop are woken together, which costs the loop one wake-up.
    """
    futures_by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for caller in callers:
        if isinstance(caller, threading.Event):
            caller.set()
        else:
            futures_by_loop.setdefault(caller.get_loop(), []).append(caller)
    for loop, futures in futures_by_loop.items():
        if loop is asyncio._get_running_loop():
            # The loop runs this very code, so it needs no wake-up.
            _set_done(futures)
            continue
        # RuntimeError: the loop is closed, so nothing awaits its futures.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_set_done, futures)


def _set_done(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        # A future may have been cancelled since the wake-up was sent.
        if not future.done():
            future.set_result(None)
