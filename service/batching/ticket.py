"""One request inside the engine: its rows by bucket, its answers as they come, and its caller,
which is woken once, when the outcome is known.

A ticket is changed only while the queue's lock is held. Callers are woken without the lock.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import TypeAlias, cast

from evalmode.service.batching.bucket import Answer, Bucket, Row
from evalmode.service.errors import RequestError

Caller: TypeAlias = threading.Event | asyncio.Future[None]


class Part:
    """The rows of one request in one bucket: (place in the request, row, bytes).

    `order` is (urgency, sequence): the lowest goes first. No two parts of one bucket have the same.
    `size` is the number of rows at the start; `rows` and `nbytes` shrink while batches take rows.
    """

    __slots__ = ("bucket", "nbytes", "order", "rows", "size", "ticket")

    def __init__(
        self,
        bucket: Bucket,
        rows: Iterable[tuple[int, Row, int]],
        *,
        order: tuple[float, int],
        ticket: Ticket,
    ) -> None:
        self.bucket = bucket
        self.rows = deque(rows)
        self.size = len(self.rows)
        self.nbytes = sum(nbytes for _, _, nbytes in self.rows)
        self.order = order
        self.ticket = ticket


class Ticket:
    """A request that was accepted: answered whole, or failed whole.

    Attributes:
        arrived: when, by the engine's clock.
        began: when its last batch so far began; None while all its rows wait.
        ended: when it was done; None until then.
        deadline: until when a row of it may be started; infinite for none.
        parts: its rows by bucket; empty once it is done.
        done: whether its caller has been, or is about to be, woken; later changes are ignored.
        dropped: the rows of each bucket, when it failed.
    """

    __slots__ = (
        "_answers",
        "_left",
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
        self._left = rows

    def answer(self, place: int, answer: Answer, *, now: float) -> bool:
        """Store the answer of one row; whether it was the last."""
        self._answers[place] = answer
        self._left -= 1
        if self._left:
            return False
        self.done = True
        self.ended = now
        self.parts = ()  # they point here: a circle that only the garbage collector would break
        return True

    def fail(self, failure: RequestError | None, *, now: float) -> None:
        """End it without answers; None when nobody waits for the reason."""
        self.done = True
        self.ended = now
        self.failure = failure
        self.dropped = tuple((part.bucket, part.size) for part in self.parts)
        self.parts = ()

    def times_s(self) -> tuple[float, float]:
        """Seconds until its last batch began, and from there to its end: together, how long it was
        in the engine.
        """
        assert self.ended is not None, "it is done"
        began = self.ended if self.began is None else self.began
        return began - self.arrived, self.ended - began

    def result(self) -> list[Answer]:
        """The answers in the order of the rows; raises what it failed with."""
        assert self.done
        if self.failure is None:
            return cast(list[Answer], self._answers)
        failure, self.failure = self.failure, None
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame


def wake(callers: Iterable[Caller]) -> None:
    """Wake the callers of tickets that are done. Those of one event loop are woken together, which
    costs the loop one wake-up.
    """
    futures_by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for caller in callers:
        if isinstance(caller, threading.Event):
            caller.set()
        else:
            futures_by_loop.setdefault(caller.get_loop(), []).append(caller)
    for loop, futures in futures_by_loop.items():
        with suppress(RuntimeError):  # the loop is closed, and its futures wait for nothing
            loop.call_soon_threadsafe(_resolve, futures)


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():  # cancelled meanwhile
            future.set_result(None)
