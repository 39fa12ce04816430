"""Runs rows in batches on a few threads.

Each job is a row with its bucket, which says how the row is run and at which row counts. Rows of
different buckets never share a batch, and a batch never has another row count. A batch starts at
once when a thread is free. Otherwise rows gather in the queue until a thread is free: the most
urgent row goes first, and with it others of its bucket.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

from evalmode.service.batching.batch import Batch, as_request_error, run_filled
from evalmode.service.batching.bucket import Answer, Job
from evalmode.service.batching.limits import Limits, Load
from evalmode.service.batching.observer import Observer, RanBatch, notify
from evalmode.service.batching.proof import Proofs, Sample
from evalmode.service.batching.queue import Queue
from evalmode.service.errors import RequestError

_log = logging.getLogger(__name__)


class Engine:
    """Answers requests of one or many rows, blocking or awaited, from any number of threads and
    event loops at once.

    A request is answered whole or fails whole. A row that makes its batch fail fails only its own
    request.
    """

    def __init__(
        self,
        *,
        parallel: int,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        content: Callable[[Answer], bytes],
        observers: Sequence[Observer] = (),
        proof_fraction: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start `parallel` threads; `content` gives the bytes of an answer, for the proof."""
        if parallel < 1:
            raise ValueError(f"parallel is {parallel}: at least 1 batch must be able to run")
        self._observers = tuple(observers)
        self._clock = clock
        self._proofs = Proofs(fraction=proof_fraction, content=content)
        self._queue = Queue(
            parallel=parallel,
            limits=limits,
            proofs=self._proofs,
            observers=self._observers,
            clock=clock,
        )
        # Daemons: a run that never returns must not keep the process from ending.
        self._threads = [
            threading.Thread(target=self._serve, name=f"engine-{number}", daemon=True)
            for number in range(parallel)
        ]
        for thread in self._threads:
            thread.start()

    def answer(self, jobs: Sequence[Job], *, timeout_s: float | None = None) -> list[Answer]:
        """The answers of `jobs`, in their order.

        Raises QueueFull; BodyTooLarge for more than the queue could ever hold; NotReady after
        `close`; DeadlineExceeded when `timeout_s` has passed; and when a row fails RunFailed, or
        the RequestError of `run`.
        """
        if not jobs:
            return []
        event = threading.Event()
        ticket = self._queue.admit(jobs, timeout_s=timeout_s, caller=event)
        try:
            if not event.wait(None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX)):
                self._queue.expire(ticket)
        except BaseException:  # an interrupt
            self._queue.drop(ticket, "cancelled", None)
            raise
        return ticket.result()

    async def answer_async(
        self,
        jobs: Sequence[Job],
        *,
        timeout_s: float | None = None,
        timed: Callable[[float, float], None] | None = None,
    ) -> list[Answer]:
        """The same, without blocking the event loop; when the task is cancelled its rows leave the
        queue at once.

        `timed` is called when an admitted request is done, answered or not: with the seconds until
        its last batch began, and those from there to its end.
        """
        if not jobs:
            return []
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        ticket = self._queue.admit(jobs, timeout_s=timeout_s, caller=future)
        timer = None
        if timeout_s is not None and timeout_s < math.inf:
            timer = loop.call_later(timeout_s, self._queue.expire, ticket)
        try:
            await future
        except BaseException:  # a cancellation
            self._queue.drop(ticket, "cancelled", None)
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if timed is not None:
                timed(*ticket.times_s())
        return ticket.result()

    async def wait_for_room(self, rows: int, *, nbytes: int = 0) -> None:
        """Return when that many rows, of `nbytes` together, would be admitted; first come first
        served.

        Nothing is reserved: another request may still take the space. Raises NotReady once the
        engine is closed, and BodyTooLarge for more than the queue could ever hold.
        """
        await self._queue.wait_for_room(rows=rows, nbytes=nbytes)

    @property
    def load(self) -> Load:
        """What waits and runs now."""
        return self._queue.load

    def stuck_s(self) -> float:
        """Seconds by which the longest run now exceeds `limits.max_run_s`; 0.0 when none does."""
        return self._queue.stuck_s()

    def retry_after_s(self) -> int:
        """Estimated seconds, 1 to 60, until the waiting rows have run, by the measured drain
        rate.
        """
        return self._queue.retry_after_s()

    def close(self, *, timeout_s: float | None = None) -> bool:
        """Admit nothing more and finish the admitted requests; False when some did not end in
        time.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        self._queue.close()
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        self._proofs.clear()
        return not any(thread.is_alive() for thread in self._threads)

    def _serve(self) -> None:
        while self._step():
            pass

    def _step(self) -> bool:
        # A function of its own, so that a thread that waits keeps no row alive in a local variable.
        work = self._queue.next()
        if isinstance(work, Batch):
            self._run(work)
        elif isinstance(work, Sample):
            self._prove(work)
        return work is not None

    def _run(self, batch: Batch) -> None:
        began = self._clock()
        outcomes = self._outcomes(batch)
        run_s = self._clock() - began
        if not isinstance(outcomes, RequestError):
            self._report_ran(batch, began=began, run_s=run_s)
            self._sample(batch, outcomes)
            self._queue.deliver(batch, outcomes, run_s=run_s)
        elif not batch.shared:
            self._queue.deliver(batch, [outcomes] * len(batch.entries))
            del outcomes  # the traceback of its cause holds this frame
        else:
            del outcomes
            self._run_single_rows(batch)

    def _outcomes(self, batch: Batch) -> Sequence[Answer | Exception] | RequestError:
        try:
            return run_filled(batch.bucket, batch.rows, places=batch.places)
        except BaseException as error:
            # SystemExit too: the thread must live, and its callers must get an error.
            return as_request_error(error)

    def _run_single_rows(self, batch: Batch) -> None:
        """Run each row of a failed batch again, alone, so that only the requests at fault fail."""
        for single in batch.single_rows():
            if self._queue.begin(single.entries[0][0]):
                self._run(single)

    def _report_ran(self, batch: Batch, *, began: float, run_s: float) -> None:
        if not self._observers:
            return
        ran = RanBatch(
            bucket=batch.bucket,
            rows=batch.rows,
            places=batch.places,
            waited_s=[began - ticket.arrived for ticket, _, _ in batch.entries],
            run_s=run_s,
        )
        for observer in self._observers:
            notify(observer.batch_ran, ran)

    def _sample(self, batch: Batch, outcomes: Sequence[Answer | Exception]) -> None:
        try:
            self._proofs.sample(batch.bucket, batch.rows, outcomes, places=batch.places)
        except Exception:  # the answers are valid all the same
            _log.exception("an answer could not be kept for its proof")

    def _prove(self, sample: Sample) -> None:
        try:
            violation = self._proofs.prove(sample)
        except BaseException:
            _log.exception(
                "a row of bucket %s/%s could not be run again for its proof",
                sample.bucket.model,
                sample.bucket.label,
            )
            return
        for observer in self._observers:
            notify(observer.proved, sample.bucket, violation)
