"""The bounded queue in front of the engine's threads.

All state that threads and callers share is here, under one lock. A request enters whole or not at
all. It leaves when all its rows have run, at its deadline, when its caller is gone, or when one of
its rows fails.

Inside the queue a request is a `Ticket`. Each of its rows is an `Entry`. A `Bucket` names the rows
that may share a batch, and the rows of a ticket in one bucket are a `Part`.

A free thread chooses its work in this order:

1. It runs a batch, if rows wait. The batch has the bucket of the most urgent row, and is filled
   with the next rows of that bucket. If no other thread is free, rows of other lengths join where
   that takes less time (`cheaper_together` in bucket.py). Most urgent is the row with the earliest
   deadline. A row without a near deadline counts as due `patience_s` after its arrival, so it
   cannot be overtaken for ever.
2. It proves an earlier answer (`proof.py`), if no other thread does so and the queue is not closed.
3. It waits, or ends if the queue is closed.

Methods named `_..._locked` are called with the lock held. They never call a model or an observer,
and never wake a caller: that happens after the lock is released.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Sequence
from itertools import count

from evalmode.service.batching.batch import Batch, as_request_error
from evalmode.service.batching.bucket import Answer, Bucket, Job, cheaper_together
from evalmode.service.batching.limits import DrainRate, Limits, Load
from evalmode.service.batching.observer import Observer, Reason, notify
from evalmode.service.batching.proof import PendingProof, Proofs
from evalmode.service.batching.ticket import Caller, Entry, Part, Ticket, wake
from evalmode.service.batching.waiting_callers import WaitingCallers
from evalmode.service.batching.waiting_rows import WaitingRows
from evalmode.service.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    NotReady,
    QueueFull,
    RequestError,
)


class Queue:
    """The rows that wait and the batches that run.

    Callers `admit` and `drop` requests. Each of `parallel` threads calls `next_work` for what it
    does next, and `deliver` with the outcomes of a batch.
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
        self._work_changed = threading.Condition(self._lock)
        self._waiting = WaitingRows()
        self._sequence = count()
        # When the run of each busy thread began, by the thread's id. A proof is a run too.
        self._running: dict[int, float] = {}
        # The id of the thread that runs a proof. Only one does: the others stay free for batches.
        self._proving: int | None = None
        # Tickets that failed at their deadline, and whose callers must still be woken.
        self._expired: list[tuple[Ticket, Reason]] = []
        self._drain_rate = DrainRate(parallel=parallel)
        self._waiting_callers = WaitingCallers(self._fits_locked)
        self._closed = False

    def admit(
        self,
        jobs: Sequence[Job],
        *,
        timeout_s: float | None,
        caller: Caller,
        wakes_threads: bool = True,
    ) -> Ticket:
        """Add a request. Its caller will be woken once, when the ticket is done.

        With `wakes_threads` the threads run it; without, the caller sees to it.

        Raises DeadlineExceeded for a timeout of 0 or less, QueueFull, BodyTooLarge for more than
        the queue can ever hold, and NotReady once it is closed.
        """
        now = self._clock()
        deadline = math.inf if timeout_s is None else now + timeout_s
        ticket = Ticket(len(jobs), arrived=now, deadline=deadline, caller=caller)

        # Group the rows by bucket. The urgency of a part is its deadline, or its patience if that
        # ends earlier; the sequence decides between equals.
        entries: dict[Bucket, list[Entry]] = {}
        for position, (bucket, row) in enumerate(jobs):
            entries.setdefault(bucket, []).append(Entry(ticket, position, row, row.nbytes))
        order = (min(deadline, now + self._limits.patience_s), next(self._sequence))
        parts = [Part(bucket, rows, order=order, ticket=ticket) for bucket, rows in entries.items()]
        nbytes = sum(part.nbytes for part in parts)
        row_counts = [(part.bucket, part.row_count) for part in parts]

        # Not `timeout_s <= 0`: a timeout that is NaN must be refused too.
        if timeout_s is not None and not timeout_s > 0:
            self._report_dropped("deadline", row_counts)
            raise _deadline_exceeded()

        with self._lock:
            self._require_admissible_locked(rows=len(jobs), nbytes=nbytes)
            fits = self._fits_locked(len(jobs), nbytes)
            if fits:
                ticket.parts = tuple(parts)
                for part in parts:
                    self._waiting.add(part)
                if wakes_threads:
                    self._work_changed.notify(len(jobs))
        if not fits:
            self._report_dropped("queue_full", row_counts)
            retry_after_s = self.retry_after_s()
            raise QueueFull(
                f"the queue has no room for {len(jobs)} more rows: retry in {retry_after_s} s",
                retry_after_s=retry_after_s,
            )
        return ticket

    def expire(self, ticket: Ticket) -> None:
        """Fail a request at its deadline, even while its rows run. Their answers are dropped."""
        self.drop(ticket, "deadline", _deadline_exceeded())

    def drop(self, ticket: Ticket, reason: Reason, failure: RequestError | None) -> None:
        """Remove a request, unless it is done already."""
        # Without the lock first. When an event loop is closed, the garbage collector ends its
        # coroutines at some later allocation, perhaps on a thread that holds this lock: it would
        # wait for itself. The tickets of such coroutines are done.
        if ticket.done:
            return
        with self._lock:
            if ticket.done:
                return
            self._fail_locked(ticket, failure)
        self._wake_and_report(dropped=[(ticket, reason)])

    def next_work(self) -> Batch | PendingProof | None:
        """Wait for the next work of the calling thread and return it. None ends the thread."""
        self._end_last_work()
        while True:
            with self._lock:
                work = self._take_work_locked()
                # Tickets past their deadline, which `_take_work_locked` removed on its way.
                expired, self._expired = self._expired, []
                if work is None and not expired:
                    if self._closed:
                        return None
                    self._work_changed.wait()
                    continue

            # Without the lock: first the callers that can go on, then the work. If there are only
            # expired tickets, the loop looks for work again.
            if expired:
                self._wake_and_report(dropped=expired)
            if isinstance(work, Batch):
                # Its rows have left the queue, so there is room for others.
                self._wake_next_caller()
            if work is not None:
                return work

    def _end_last_work(self) -> None:
        """The calling thread is free: a thread that asks for work has ended its last work."""
        thread = threading.get_ident()
        with self._lock:
            self._running.pop(thread, None)
            if self._proving == thread:
                self._proving = None

    def next_batch_within(self, longest_s: float) -> Batch | None:
        """The next batch that takes at most `longest_s`, which begins now; None if there is none.

        For event loops: unlike `next_work` it never waits.
        """
        with self._lock:
            batch = self._next_batch_locked(longest_s)
            if batch is not None:
                self._running[threading.get_ident()] = self._clock()
            expired, self._expired = self._expired, []
        if expired:
            self._wake_and_report(dropped=expired)
        if batch is not None:
            self._wake_next_caller()
        return batch

    def wake_thread(self) -> None:
        """Let an idle thread look for work: for rows that wait, or for a proof."""
        with self._lock:
            self._work_changed.notify()

    def restart_run(self, ticket: Ticket) -> bool:
        """Begin to run a row of a failed batch again. False if its request is done already."""
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
        """Deliver the outcomes of a batch. `run_s` is how long it ran, None if it raised."""
        answered: list[Ticket] = []
        failed: list[tuple[Ticket, Reason]] = []
        with self._lock:
            self._running.pop(threading.get_ident(), None)
            if run_s is not None:
                self._drain_rate.record(
                    rows=len(batch.entries), run_s=run_s, under_load=batch.under_load
                )
            now = self._clock()
            for entry, outcome in zip(batch.entries, outcomes, strict=True):
                ticket = entry.ticket
                if ticket.done:
                    continue
                if isinstance(outcome, Exception):
                    self._fail_locked(ticket, as_request_error(outcome))
                    failed.append((ticket, "failed"))
                elif ticket.answer(entry.position, outcome, now=now):
                    answered.append(ticket)
        self._wake_and_report(answered=answered, dropped=failed)

    async def wait_for_room(self, *, rows: int, nbytes: int) -> None:
        """Return when a request of this size would be admitted. Nothing is reserved.

        Callers wait in a line. When there is room, the first one is woken and has the turn: it
        calls `admit` before its next `await`. Then the next caller is woken.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._lock:
            self._require_admissible_locked(rows=rows, nbytes=nbytes)
            must_wait = self._waiting_callers.join(future, rows=rows, nbytes=nbytes)
        if not must_wait:
            return
        try:
            await future
        finally:
            # The turn ends once the caller has run up to its next `await`. In a closed loop the
            # garbage collector may run this, as in `drop`, so no lock is taken: `next_caller` skips
            # the callers of closed loops.
            if not loop.is_closed():
                loop.call_soon(self._end_turn, future)
        # The queue may have been closed meanwhile.
        with self._lock:
            self._require_admissible_locked(rows=rows, nbytes=nbytes)

    @property
    def load(self) -> Load:
        """The rows that wait and the batches that run now."""
        with self._lock:
            proofs = 1 if self._proving is not None else 0
            return Load(
                waiting_rows=self._waiting.rows,
                waiting_bytes=self._waiting.nbytes,
                running_batches=len(self._running) - proofs,
                parallel=self._parallel,
            )

    def stuck_s(self) -> float:
        """Seconds by which the longest run exceeds `max_run_s`; 0.0 if none does."""
        with self._lock:
            oldest = min(self._running.values(), default=math.inf)
        return max(0.0, self._clock() - oldest - self._limits.max_run_s)

    def retry_after_s(self) -> int:
        """Estimated seconds, from 1 to 60, until the waiting rows have run."""
        with self._lock:
            return self._drain_rate.retry_after_s(
                self._waiting.rows, assumed_row_s=self._assumed_row_s_locked()
            )

    def close(self) -> None:
        """Admit no more requests. The threads end when no rows wait."""
        with self._lock:
            self._closed = True
            self._work_changed.notify_all()
            futures = self._waiting_callers.clear()
        wake(futures)

    def _require_admissible_locked(self, *, rows: int, nbytes: int) -> None:
        """Raise NotReady or BodyTooLarge for a request that can never be admitted."""
        if self._closed:
            raise NotReady("the server is stopping and takes no more requests")
        if rows > self._limits.queue_rows or nbytes > self._limits.queue_bytes:
            raise BodyTooLarge(
                f"the request has {rows} rows of {nbytes} bytes, and the queue of this server holds"
                f" {self._limits.queue_rows} rows of {self._limits.queue_bytes} bytes: split it, or"
                " raise the settings queue_rows and queue_bytes"
            )

    def _fits_locked(self, rows: int, nbytes: int) -> bool:
        # The wait of the first new row: the new rows themselves do not count, so a large request
        # enters an empty queue whatever `queue_s` is.
        wait_s = self._drain_rate.wait_s(
            self._waiting.rows, assumed_row_s=self._assumed_row_s_locked()
        )
        return (
            self._waiting.rows + rows <= self._limits.queue_rows
            and self._waiting.nbytes + nbytes <= self._limits.queue_bytes
            and wait_s <= self._limits.queue_s
        )

    def _assumed_row_s_locked(self) -> float:
        """Seconds per row before the first batch: those of the slowest bucket that waits."""
        if self._drain_rate.is_known:
            return 0.0
        return max((bucket.row_cost_s for bucket in self._waiting), default=0.0)

    def _fail_locked(self, ticket: Ticket, failure: RequestError | None) -> None:
        for part in ticket.parts:
            self._waiting.remove(part)
        ticket.fail(failure, now=self._clock())

    def _take_work_locked(self) -> Batch | PendingProof | None:
        """The next work of this thread, which begins now; None if there is none."""
        thread = threading.get_ident()
        work: Batch | PendingProof | None = self._next_batch_locked()
        # Callers of expired tickets are woken before a proof begins.
        if work is None and self._proving is None and not self._expired and not self._closed:
            work = self._proofs.take()
            if work is not None:
                self._proving = thread
        if work is not None:
            self._running[thread] = self._clock()
        return work

    def _next_batch_locked(self, longest_s: float = math.inf) -> Batch | None:
        """The batch of the most urgent row, if it takes at most `longest_s`. None if there is none.

        Rows of a ticket past its deadline never run: the ticket fails, and `_expired` gets it.
        """
        while (head := self._waiting.head(longest_s=longest_s)) is not None:
            sources, size, planned_count = self._plan_batch_locked(head.bucket, longest_s)
            bucket = sources[-1]

            now = self._clock()
            entries: list[Entry] = []
            for source in sources:
                while len(entries) < planned_count:
                    part = self._waiting.head_of(source)
                    if part is None:
                        break
                    # The timer of the deadline may be late, or not have been set at all.
                    if part.ticket.deadline <= now:
                        self._fail_locked(part.ticket, _deadline_exceeded())
                        self._expired.append((part.ticket, "deadline"))
                        continue
                    part.ticket.began = now
                    entries += self._waiting.take(part, planned_count - len(entries))

            # Without entries all rows of these buckets had expired: try the next bucket.
            if not entries:
                continue
            # Expired rows may have left fewer than planned.
            if len(entries) < planned_count:
                size = bucket.cheapest_size(len(entries))
            under_load = self._waiting.rows > 0
            return Batch(bucket=bucket, entries=entries, size=size, under_load=under_load)
        return None

    def _plan_batch_locked(self, bucket: Bucket, longest_s: float) -> tuple[list[Bucket], int, int]:
        """The buckets whose rows the next batch takes, its size, and how many rows it takes.

        `bucket` is one of the buckets. The batch runs in the last one.
        """
        free_threads = 1
        if longest_s == math.inf:
            # The waiting rows are shared among this thread and the idle ones. This thread is not in
            # `_running` yet. Event loops may be in it, beyond the number of threads.
            free_threads = max(1, self._parallel - len(self._running))

        # An idle thread would run the rows of another bucket at the same time.
        if free_threads == 1 and bucket.pads_rows:
            row_counts = {
                other: self._waiting.rows_of(other)
                for other in self._waiting
                if other.steady_s <= longest_s
            }
            buckets = cheaper_together(bucket, row_counts)
            rows = sum(row_counts[other] for other in buckets)
            if len(buckets) > 1 and buckets[-1].costs[rows] <= longest_s:
                return buckets, rows, rows

        share = math.ceil(self._waiting.rows_of(bucket) / free_threads)
        size = bucket.best_size(share, longest_s=longest_s)
        return [bucket], size, min(size, share)

    def _wake_and_report(
        self,
        *,
        answered: Sequence[Ticket] = (),
        dropped: Sequence[tuple[Ticket, Reason]] = (),
    ) -> None:
        """Wake the callers of tickets that are done, and report those that were dropped."""
        for ticket, reason in dropped:
            self._report_dropped(reason, ticket.dropped)
        wake([ticket.caller for ticket in answered] + [ticket.caller for ticket, _ in dropped])
        if dropped:
            self._wake_next_caller()

    def _report_dropped(self, reason: Reason, row_counts: Sequence[tuple[Bucket, int]]) -> None:
        for observer in self._observers:
            for bucket, row_count in row_counts:
                notify(observer.rows_dropped, reason, bucket, row_count)

    def _wake_next_caller(self) -> None:
        """Wake the first of the callers in `wait_for_room`, if its rows fit now."""
        # Read without the lock: a caller that joins later checks for room itself.
        if not len(self._waiting_callers):
            return
        with self._lock:
            first = self._waiting_callers.next_caller()
        if first is not None:
            wake([first])

    def _end_turn(self, future: asyncio.Future[None]) -> None:
        with self._lock:
            self._waiting_callers.leave(future)
        self._wake_next_caller()


def _deadline_exceeded() -> DeadlineExceeded:
    return DeadlineExceeded(
        "the request reached its deadline before it was answered: retry, or allow more time"
    )
