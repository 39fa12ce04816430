"""The bounded queue before the engine's threads, and all that they share with their callers, under
one lock.

A request comes in whole or not at all; it leaves by being run, at its deadline, when its caller is
gone, or when one of its rows has failed. Urgency is the deadline, or the arrival plus `patience_s`
if that comes earlier: nothing that came `patience_s` later goes first. With the lock held nobody is
called: no `run`, no observer, and nobody is woken.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Sequence
from itertools import count

from evalmode.service.batching.batch import Batch, as_request_error
from evalmode.service.batching.bucket import Answer, Bucket, Job, Row
from evalmode.service.batching.drain import Drain
from evalmode.service.batching.limits import Limits, Load
from evalmode.service.batching.observer import Observer, Reason, notify
from evalmode.service.batching.proof import Proofs, Sample
from evalmode.service.batching.ticket import Caller, Part, Ticket, wake
from evalmode.service.batching.waiters import Room
from evalmode.service.batching.waiting import Waiting
from evalmode.service.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    NotReady,
    QueueFull,
    RequestError,
)


class Queue:
    """What waits and what runs. Callers `admit` and `drop`; `parallel` threads ask for the `next`
    and `deliver` it.
    """

    def __init__(
        self,
        *,
        parallel: int,
        limits: Limits,
        proofs: Proofs,
        observers: Sequence[Observer],
        clock: Callable[[], float],
    ) -> None:
        self._parallel = parallel
        self._limits = limits
        self._proofs = proofs
        self._observers = observers
        self._clock = clock
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._waiting = Waiting()
        self._sequence = count()
        self._running: dict[int, float] = {}  # thread -> when its run began
        self._proving: int | None = None  # the thread; one at a time, so that the others stay free
        self._drain = Drain(parallel=parallel)
        self._room = Room(self._fits)
        self._closed = False

    def admit(
        self,
        jobs: Sequence[Job],
        *,
        timeout_s: float | None,
        caller: Caller,
    ) -> Ticket:
        """Let a request wait; its caller will be woken once, when it is done."""
        items: dict[Bucket, list[tuple[int, Row, int]]] = {}
        for place, (bucket, row) in enumerate(jobs):
            items.setdefault(bucket, []).append((place, row, row.nbytes))
        if timeout_s is not None and not timeout_s > 0:
            self._tell_dropped(
                "deadline", [(bucket, len(of_bucket)) for bucket, of_bucket in items.items()]
            )
            raise _late()
        now = self._clock()
        deadline = math.inf if timeout_s is None else now + timeout_s
        ticket = Ticket(len(jobs), arrived=now, deadline=deadline, caller=caller)
        order = (min(deadline, now + self._limits.patience_s), next(self._sequence))
        parts = tuple(
            Part(bucket, of_bucket, order=order, ticket=ticket)
            for bucket, of_bucket in items.items()
        )
        if not self._enter(ticket, parts, rows=len(jobs)):
            self._tell_dropped("queue_full", [(part.bucket, part.size) for part in parts])
            raise QueueFull(
                f"the queue has no room for {len(jobs)} more rows: come again later",
                retry_after_s=self.retry_after_s(),
            )
        return ticket

    def expire(self, ticket: Ticket) -> None:
        """Its deadline has come: it fails, even while its rows run; what they answer is dropped."""
        self.drop(ticket, "deadline", _late())

    def drop(self, ticket: Ticket, reason: Reason, failure: RequestError | None) -> None:
        """Take a request out, unless it is done already."""
        # the garbage collector may get here, through a coroutine whose loop is gone, under the lock
        if ticket.done:
            return
        with self._lock:
            if ticket.done:
                return
            self._fail(ticket, failure)
        self._end(dropped=[(ticket, reason)])

    def next(self) -> Batch | Sample | None:
        """What the thread that asks is to run, once there is something; None when it is to end."""
        while True:
            late: list[Ticket] = []
            with self._lock:
                work = self._await(late)
            self._end(dropped=[(ticket, "deadline") for ticket in late])
            if isinstance(work, Batch):
                self._offer_room()
            if work is not None or not late:
                return work

    def begin(self, ticket: Ticket) -> bool:
        """Whether a row of a batch that failed is still to be run again; if so, its run begins
        now.
        """
        now = self._clock()
        if ticket.deadline <= now:
            self.expire(ticket)
        with self._lock:
            if not ticket.done:
                self._running[threading.get_ident()] = now
            return not ticket.done

    def deliver(
        self,
        batch: Batch,
        outcomes: Sequence[Answer | Exception],
        *,
        run_s: float | None = None,
    ) -> None:
        """Hand out what a batch has answered, in `run_s` if it was not for an error."""
        answered: list[Ticket] = []
        failed: list[tuple[Ticket, Reason]] = []
        with self._lock:
            self._running.pop(threading.get_ident(), None)
            if run_s is not None:
                self._drain.record(rows=len(batch.entries), run_s=run_s, pressed=batch.pressed)
            for (ticket, place, _), outcome in zip(batch.entries, outcomes, strict=True):
                if ticket.done:
                    continue
                if isinstance(outcome, Exception):
                    self._fail(ticket, as_request_error(outcome))
                    failed.append((ticket, "failed"))
                elif ticket.answer(place, outcome):
                    answered.append(ticket)
        self._end(answered=answered, dropped=failed)

    async def wait_for_room(self, *, rows: int, nbytes: int) -> None:
        """Return when a request of so many rows and bytes would be admitted; nothing is reserved
        for it.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._lock:
            self._check(rows=rows, nbytes=nbytes)
            if not self._room.join(future, rows=rows, nbytes=nbytes):
                return
        try:
            await future
        finally:  # without the lock: the garbage collector may get here, as in `drop`
            if not loop.is_closed():
                # after this turn, in which he who was woken takes his room
                loop.call_soon(self._leave_room, future)
        self._check(rows=rows, nbytes=nbytes)

    @property
    def load(self) -> Load:
        """What waits and runs now."""
        with self._lock:
            return Load(
                waiting_rows=self._waiting.rows,
                waiting_bytes=self._waiting.nbytes,
                running_batches=len(self._running) - (self._proving is not None),
                parallel=self._parallel,
            )

    def stuck_s(self) -> float:
        """Seconds by which the longest run exceeds `max_run_s`."""
        with self._lock:
            oldest = min(self._running.values(), default=math.inf)
        return max(0.0, self._clock() - oldest - self._limits.max_run_s)

    def retry_after_s(self) -> int:
        """Seconds, 1 to 60, until what waits should have run."""
        with self._lock:
            return self._drain.retry_after_s(
                self._waiting.rows, assumed_row_s=self._assumed_row_s()
            )

    def close(self) -> None:
        """Admit nothing more; threads end when nothing waits."""
        with self._lock:
            self._closed = True
            self._work.notify_all()
            waiters = self._room.all()
        wake(waiters)

    def _enter(
        self,
        ticket: Ticket,
        parts: tuple[Part, ...],
        *,
        rows: int,
    ) -> bool:
        nbytes = sum(part.nbytes for part in parts)
        with self._lock:
            self._check(rows=rows, nbytes=nbytes)
            if not self._fits(rows, nbytes):
                return False
            ticket.parts = parts
            for part in parts:
                self._waiting.add(part)
            self._work.notify(rows)
        return True

    # From here the lock is held.

    def _check(self, *, rows: int, nbytes: int) -> None:
        if self._closed:
            raise NotReady("the server is stopping and takes no more requests")
        if rows > self._limits.queue_rows or nbytes > self._limits.queue_bytes:
            raise BodyTooLarge(
                f"the request has {rows} rows of {nbytes} bytes, and the queue of this server holds"
                f" {self._limits.queue_rows} rows of {self._limits.queue_bytes} bytes: split it"
            )

    def _fits(self, rows: int, nbytes: int) -> bool:
        wait_s = self._drain.wait_s(self._waiting.rows, assumed_row_s=self._assumed_row_s())
        return (
            self._waiting.rows + rows <= self._limits.queue_rows
            and self._waiting.nbytes + nbytes <= self._limits.queue_bytes
            and wait_s <= self._limits.queue_s
        )

    def _assumed_row_s(self) -> float:
        return max((bucket.row_cost_s for bucket in self._waiting), default=0.0)

    def _fail(self, ticket: Ticket, failure: RequestError | None) -> None:
        for part in ticket.parts:
            self._waiting.remove(part)
        ticket.fail(failure)

    def _await(self, late: list[Ticket]) -> Batch | Sample | None:
        me = threading.get_ident()
        self._running.pop(me, None)
        if self._proving == me:
            self._proving = None
        while True:
            work: Batch | Sample | None = self._take(late)
            if work is None and self._proving is None and not self._closed and not late:
                work = self._proofs.take()
                self._proving = me if work is not None else None
            if work is not None:
                self._running[me] = self._clock()
            if work is not None or late or self._closed:
                return work
            self._work.wait()

    def _take(self, late: list[Ticket]) -> Batch | None:
        while (head := self._waiting.head()) is not None:
            bucket = head.bucket
            # this thread and all that wait or are about to ask
            free = self._parallel - len(self._running)
            wanted = -(-self._waiting.rows_of(bucket) // free)
            places = bucket.places_for(wanted)
            entries = self._fill(bucket, min(places, wanted), late)
            if entries:
                if len(entries) < min(places, wanted):  # the others were late
                    places = bucket.cheapest_holding(len(entries))
                return Batch(
                    bucket=bucket, entries=entries, places=places, pressed=self._waiting.rows > 0
                )
        return None

    def _fill(self, bucket: Bucket, rows: int, late: list[Ticket]) -> list[tuple[Ticket, int, Row]]:
        now = self._clock()
        entries: list[tuple[Ticket, int, Row]] = []
        while len(entries) < rows and (part := self._waiting.head(bucket)) is not None:
            ticket = part.ticket
            if ticket.deadline <= now:
                self._fail(ticket, _late())
                late.append(ticket)
            else:
                entries += [
                    (ticket, place, row)
                    for place, row in self._waiting.take(part, rows - len(entries))
                ]
        return entries

    # From here it is not.

    def _end(
        self,
        *,
        answered: Sequence[Ticket] = (),
        dropped: Sequence[tuple[Ticket, Reason]] = (),
    ) -> None:
        for ticket, reason in dropped:
            self._tell_dropped(reason, ticket.dropped)
        wake([ticket.caller for ticket in answered] + [ticket.caller for ticket, _ in dropped])
        if dropped:
            self._offer_room()

    def _tell_dropped(self, reason: Reason, dropped: Sequence[tuple[Bucket, int]]) -> None:
        for observer in self._observers:
            for bucket, rows in dropped:
                notify(observer.rows_dropped, reason, bucket, rows)

    def _offer_room(self) -> None:
        # without the lock: whoever joins after it sees for himself what room there is
        if not len(self._room):
            return
        with self._lock:
            first = self._room.next()
        if first is not None:
            wake([first])

    def _leave_room(self, future: asyncio.Future[None]) -> None:
        with self._lock:
            self._room.leave(future)
        self._offer_room()


def _late() -> DeadlineExceeded:
    return DeadlineExceeded(
        "the answer was not there at the deadline of the request: come again, or allow more time"
    )
