"""The bounded queue in front of the engine's threads, and all state that threads and callers share,
under one lock.

A request enters whole or not at all. It leaves by being run, at its deadline, when its caller is
gone, or when one of its rows has failed. Urgency is the deadline, or the arrival plus `patience_s`
if that is earlier: rows that came `patience_s` later never go first. Methods named `_..._locked`
are called with the lock held. Nothing foreign is called with it held: no `run`, no observer, and
no caller is woken.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Sequence
from itertools import count

from evalmode.service.batching.batch import Batch, as_request_error
from evalmode.service.batching.bucket import Answer, Bucket, Job, Row
from evalmode.service.batching.limits import DrainRate, Limits, Load
from evalmode.service.batching.observer import Observer, Reason, notify
from evalmode.service.batching.proof import Proofs, Sample
from evalmode.service.batching.ticket import Caller, Part, Ticket, wake
from evalmode.service.batching.waiters import Waiters
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
    work and `deliver` its outcomes.
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
        self._drain_rate = DrainRate(parallel=parallel)
        self._waiters = Waiters(self._fits_locked)
        self._closed = False

    def admit(self, jobs: Sequence[Job], *, timeout_s: float | None, caller: Caller) -> Ticket:
        """Let a request wait; its caller will be woken once, when it is done."""
        rows_by_bucket: dict[Bucket, list[tuple[int, Row, int]]] = {}
        for place, (bucket, row) in enumerate(jobs):
            rows_by_bucket.setdefault(bucket, []).append((place, row, row.nbytes))
        if timeout_s is not None and not timeout_s > 0:
            self._report_dropped(
                "deadline", [(bucket, len(rows)) for bucket, rows in rows_by_bucket.items()]
            )
            raise _deadline_exceeded()
        now = self._clock()
        deadline = math.inf if timeout_s is None else now + timeout_s
        ticket = Ticket(len(jobs), arrived=now, deadline=deadline, caller=caller)
        order = (min(deadline, now + self._limits.patience_s), next(self._sequence))
        parts = tuple(
            Part(bucket, rows, order=order, ticket=ticket)
            for bucket, rows in rows_by_bucket.items()
        )
        nbytes = sum(part.nbytes for part in parts)
        with self._lock:
            self._require_possible(rows=len(jobs), nbytes=nbytes)
            fits = self._fits_locked(len(jobs), nbytes)
            if fits:
                ticket.parts = parts
                for part in parts:
                    self._waiting.add(part)
                self._work.notify(len(jobs))
        if not fits:
            self._report_dropped("queue_full", [(part.bucket, part.size) for part in parts])
            raise QueueFull(
                f"the queue has no room for {len(jobs)} more rows: come again later",
                retry_after_s=self.retry_after_s(),
            )
        return ticket

    def expire(self, ticket: Ticket) -> None:
        """Its deadline has come: it fails, even while its rows run. Their answers are dropped."""
        self.drop(ticket, "deadline", _deadline_exceeded())

    def drop(self, ticket: Ticket, reason: Reason, failure: RequestError | None) -> None:
        """Remove a request, unless it is done already."""
        # The garbage collector may call this with the lock held, through a coroutine whose loop is
        # gone. Such a ticket is done, so the lock must not be taken before this check.
        if ticket.done:
            return
        with self._lock:
            if ticket.done:
                return
            self._fail_locked(ticket, failure)
        self._finish(dropped=[(ticket, reason)])

    def next(self) -> Batch | Sample | None:
        """The work for the calling thread, once there is some; None when the thread must end."""
        while True:
            late: list[Ticket] = []
            with self._lock:
                work = self._await_work_locked(late)
            self._finish(dropped=[(ticket, "deadline") for ticket in late])
            if isinstance(work, Batch):
                self._offer_space()
            if work is not None or not late:
                return work

    def begin(self, ticket: Ticket) -> bool:
        """Whether a row of a failed batch must still be run again; if so, its run begins now."""
        now = self._clock()
        if ticket.deadline <= now:
            self.expire(ticket)
        with self._lock:
            if not ticket.done:
                self._running[threading.get_ident()] = now
            return not ticket.done

    def deliver(
        self, batch: Batch, outcomes: Sequence[Answer | Exception], *, run_s: float | None = None
    ) -> None:
        """Hand out the outcomes of a batch; `run_s` is its duration, None where it raised."""
        answered: list[Ticket] = []
        failed: list[tuple[Ticket, Reason]] = []
        with self._lock:
            self._running.pop(threading.get_ident(), None)
            if run_s is not None:
                self._drain_rate.record(rows=len(batch.entries), run_s=run_s, pressed=batch.pressed)
            now = self._clock()
            for (ticket, place, _), outcome in zip(batch.entries, outcomes, strict=True):
                if ticket.done:
                    continue
                if isinstance(outcome, Exception):
                    self._fail_locked(ticket, as_request_error(outcome))
                    failed.append((ticket, "failed"))
                elif ticket.answer(place, outcome, now=now):
                    answered.append(ticket)
        self._finish(answered=answered, dropped=failed)

    async def wait_for_room(self, *, rows: int, nbytes: int) -> None:
        """Return when a request of so many rows and bytes would be admitted; nothing is reserved
        for it.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._lock:
            self._require_possible(rows=rows, nbytes=nbytes)
            if not self._waiters.join(future, rows=rows, nbytes=nbytes):
                return
        try:
            await future
        finally:  # without the lock: the garbage collector may call this, as in `drop`
            if not loop.is_closed():
                # The turn ends after this step of the loop, in which the caller uses the space.
                loop.call_soon(self._end_turn, future)
        self._require_possible(rows=rows, nbytes=nbytes)

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
        """Estimated seconds, 1 to 60, until the waiting rows have run."""
        with self._lock:
            return self._drain_rate.retry_after_s(
                self._waiting.rows, assumed_row_s=self._assumed_row_s_locked()
            )

    def close(self) -> None:
        """Admit nothing more; threads end when nothing waits."""
        with self._lock:
            self._closed = True
            self._work.notify_all()
            waiters = self._waiters.clear()
        wake(waiters)

    def _require_possible(self, *, rows: int, nbytes: int) -> None:
        if self._closed:
            raise NotReady("the server is stopping and takes no more requests")
        if rows > self._limits.queue_rows or nbytes > self._limits.queue_bytes:
            raise BodyTooLarge(
                f"the request has {rows} rows of {nbytes} bytes, and the queue of this server holds"
                f" {self._limits.queue_rows} rows of {self._limits.queue_bytes} bytes: split it, or"
                " raise the settings queue_rows and queue_bytes"
            )

    def _fits_locked(self, rows: int, nbytes: int) -> bool:
        wait_s = self._drain_rate.wait_s(
            self._waiting.rows, assumed_row_s=self._assumed_row_s_locked()
        )
        return (
            self._waiting.rows + rows <= self._limits.queue_rows
            and self._waiting.nbytes + nbytes <= self._limits.queue_bytes
            and wait_s <= self._limits.queue_s
        )

    def _assumed_row_s_locked(self) -> float:
        return max((bucket.row_cost_s for bucket in self._waiting), default=0.0)

    def _fail_locked(self, ticket: Ticket, failure: RequestError | None) -> None:
        for part in ticket.parts:
            self._waiting.remove(part)
        ticket.fail(failure, now=self._clock())

    def _await_work_locked(self, late: list[Ticket]) -> Batch | Sample | None:
        """Wait for a batch or, while there is none, a sample. Tickets past their deadline are added
        to `late`; None where there are some, or the queue is closed and empty.
        """
        thread = threading.get_ident()
        self._running.pop(thread, None)
        if self._proving == thread:
            self._proving = None
        while True:
            work: Batch | Sample | None = self._next_batch_locked(late)
            if work is None and self._proving is None and not self._closed and not late:
                work = self._proofs.take()
                self._proving = thread if work is not None else None
            if work is not None:
                self._running[thread] = self._clock()
            if work is not None or late or self._closed:
                return work
            self._work.wait()

    def _next_batch_locked(self, late: list[Ticket]) -> Batch | None:
        while (head := self._waiting.head()) is not None:
            bucket = head.bucket
            # The rows are shared among the threads without a run: this one and the idle ones.
            free_threads = self._parallel - len(self._running)
            row_count = math.ceil(self._waiting.rows_of(bucket) / free_threads)
            places = bucket.places_for(row_count)
            row_count = min(places, row_count)
            entries = self._take_entries_locked(bucket, row_count, late)
            if entries:
                if len(entries) < row_count:  # the others were late
                    places = bucket.cheapest_holding(len(entries))
                return Batch(
                    bucket=bucket, entries=entries, places=places, pressed=self._waiting.rows > 0
                )
        return None

    def _take_entries_locked(
        self, bucket: Bucket, row_count: int, late: list[Ticket]
    ) -> list[tuple[Ticket, int, Row]]:
        now = self._clock()
        entries: list[tuple[Ticket, int, Row]] = []
        while len(entries) < row_count and (part := self._waiting.head(bucket)) is not None:
            ticket = part.ticket
            if ticket.deadline <= now:
                self._fail_locked(ticket, _deadline_exceeded())
                late.append(ticket)
            else:
                ticket.began = now
                rows = self._waiting.take(part, row_count - len(entries))
                entries += [(ticket, place, row) for place, row in rows]
        return entries

    def _finish(
        self,
        *,
        answered: Sequence[Ticket] = (),
        dropped: Sequence[tuple[Ticket, Reason]] = (),
    ) -> None:
        for ticket, reason in dropped:
            self._report_dropped(reason, ticket.dropped)
        wake([ticket.caller for ticket in answered] + [ticket.caller for ticket, _ in dropped])
        if dropped:
            self._offer_space()

    def _report_dropped(self, reason: Reason, dropped: Sequence[tuple[Bucket, int]]) -> None:
        for observer in self._observers:
            for bucket, rows in dropped:
                notify(observer.rows_dropped, reason, bucket, rows)

    def _offer_space(self) -> None:
        # Read without the lock: a caller that joins later checks for space itself.
        if not len(self._waiters):
            return
        with self._lock:
            first = self._waiters.next()
        if first is not None:
            wake([first])

    def _end_turn(self, future: asyncio.Future[None]) -> None:
        with self._lock:
            self._waiters.leave(future)
        self._offer_space()


def _deadline_exceeded() -> DeadlineExceeded:
    return DeadlineExceeded(
        "the answer was not there at the deadline of the request: come again, or allow more time"
    )
