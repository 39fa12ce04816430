"""One request inside the engine: its answers as they come, and its caller, who is woken once, when
all is known.

Knows no queue; whoever changes a ticket holds the engine's lock. Waking is done without it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Generic, cast

from evalmode.service.batching.bucket import Answer, Bucket, Row
from evalmode.service.batching.waiting import Part
from evalmode.service.errors import RequestError

Caller = threading.Event | asyncio.Future[None]


class Ticket(Generic[Row, Answer]):
    """A request that was accepted: answered whole, or failed whole.

    Attributes:
        arrived: when, by the engine's clock.
        deadline: until when a row of it may be started; infinite for none.
        parts: its rows by bucket; empty once it is done.
        done: whether its caller has been, or is about to be, woken; nothing that comes later
            changes it.
        dropped: the rows of each bucket, when it failed.
    """

    __slots__ = (
        "_answers",
        "_left",
        "arrived",
        "caller",
        "deadline",
        "done",
        "dropped",
        "failure",
        "parts",
    )

    def __init__(self, rows: int, *, arrived: float, deadline: float, caller: Caller) -> None:
        self.arrived = arrived
        self.deadline = deadline
        self.caller = caller
        self.parts: tuple[Part[Bucket[Row, Answer], Row, Ticket[Row, Answer]], ...] = ()
        self.done = False
        self.dropped: tuple[tuple[Bucket[Row, Answer], int], ...] = ()
        self.failure: RequestError | None = None
        self._answers: list[Answer | None] = [None] * rows
        self._left = rows

    def answer(self, place: int, answer: Answer) -> bool:
        """Take the answer of one row; whether it was the last."""
        self._answers[place] = answer
        self._left -= 1
        if self._left:
            return False
        self.done = True
        self.parts = ()  # they point here: a circle that only the garbage collector would find
        return True

    def fail(self, failure: RequestError | None) -> None:
        """End it without answers; None when nobody waits for the reason."""
        self.done = True
        self.failure = failure
        self.dropped = tuple((part.bucket, part.size) for part in self.parts)
        self.parts = ()

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
    """Wake the callers of tickets that are done; those of one event loop together, which costs it
    one wake-up.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for caller in callers:
        if isinstance(caller, threading.Event):
            caller.set()
        else:
            by_loop.setdefault(caller.get_loop(), []).append(caller)
    for loop, futures in by_loop.items():
        # the loop is closed: nobody is left there who could hear of it
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_resolve, futures)


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():  # cancelled meanwhile
            future.set_result(None)
