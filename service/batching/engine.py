"""Runs rows in batches: short ones in the event loop, all others on a few threads.

A job is a row with its bucket, which says how the row is run and at which batch sizes. Rows of
different buckets share a batch only where padding is proved to change no bit. A batch starts at
once if a thread is free. Otherwise rows wait in the queue until a thread is free. `queue.py`
decides which rows run next.

A short request that is awaited runs in its event loop, with all short requests that arrived in the
same turn of the loop: to hand it to a thread and back takes about as long as a small model runs.
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
from evalmode.service.batching.proof import PendingProof, Proofs
from evalmode.service.batching.queue import Queue

_log = logging.getLogger(__name__)

# A run of at most this time is short: the event loop runs it itself. A thread costs two changes of
# threads, about 0.1 ms, and the other requests of the loop wait for the run.
_SHORT_RUN_S = 0.001
# The same for an engine of one thread: the process is to use one core, so that a thread only takes
# turns with the loop. Probes, deadlines and clients that hang up wait for at most one such run.
_SHORT_RUN_ALONE_S = 0.01
# After a longer run in an event loop, its bucket is for the threads. That is more than a cold cache
# or another process explains.
_LONGEST_LOOP_RUN_S = 2 * _SHORT_RUN_ALONE_S


class Engine:
    """Answers requests of one or many rows, blocking or awaited. It may be called from any number
    of threads and event loops at once.

    All of a request is answered, or all of it fails. A row that makes its batch fail fails only its
    own request.

        engine = Engine(parallel=2, content=content_of)
        jobs, truncated = model.text_rows(["a text", "another text"])
        answers = engine.answer(jobs, timeout_s=1.0)
        engine.close()
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
        """Start the threads.

        `parallel` is their number, and so the number of batches that run at once. `content` gives
        the bytes of an answer, which proofs compare. `proof_fraction` is the share of the answers
        that is proved, from 0 to 1.
        """
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
        self._short_run_s = _SHORT_RUN_ALONE_S if parallel == 1 else _SHORT_RUN_S
        # The event loops that will run a batch in their next turn.
        self._loops_to_run: set[asyncio.AbstractEventLoop] = set()
        # Daemons: a run that never returns must not keep the process from ending.
        self._threads = [
            threading.Thread(target=self._serve, name=f"engine-{number}", daemon=True)
            for number in range(parallel)
        ]
        for thread in self._threads:
            thread.start()

    def answer(self, jobs: Sequence[Job], *, timeout_s: float | None = None) -> list[Answer]:
        """The answers of `jobs`, in their order.

        Raises QueueFull, BodyTooLarge for more than the queue can ever hold, NotReady after
        `close`, and DeadlineExceeded when `timeout_s` has passed. When a row fails it raises the
        RequestError of `run`, or RunFailed for any other error.
        """
        if not jobs:
            return []
        event = threading.Event()
        ticket = self._queue.admit(jobs, timeout_s=timeout_s, caller=event)
        try:
            if not event.wait(None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX)):
                self._queue.expire(ticket)
        except BaseException:
            # An interrupt, for example Ctrl-C.
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
        """The same, without blocking the event loop. When the task is cancelled, its rows leave the
        queue at once.

        `timed` is called when an admitted request is done, answered or not. Its arguments are the
        seconds until the last batch of the request began, and from there to its end.
        """
        if not jobs:
            return []
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        is_short = self._is_short(jobs)
        ticket = self._queue.admit(
            jobs, timeout_s=timeout_s, caller=future, wakes_threads=not is_short
        )
        if is_short:
            self._run_soon(loop)
        timer = None
        if timeout_s is not None and timeout_s < math.inf:
            timer = loop.call_later(timeout_s, self._queue.expire, ticket)
        try:
            await future
        except BaseException:
            # A cancellation, for example because the client has closed its connection.
            self._queue.drop(ticket, "cancelled", None)
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if timed is not None:
                timed(*ticket.times_s())
        return ticket.result()

    async def wait_for_room(self, rows: int, *, nbytes: int = 0) -> None:
        """Return when so many rows, of `nbytes` bytes together, would be admitted. First come first
        served.

        Nothing is reserved: another request may use the room before. Raises NotReady once the
        engine is closed, and BodyTooLarge for more than the queue can ever hold.
        """
        await self._queue.wait_for_room(rows=rows, nbytes=nbytes)

    @property
    def load(self) -> Load:
        """The rows that wait and the batches that run now."""
        return self._queue.load

    def stuck_s(self) -> float:
        """Seconds by which the longest run exceeds `limits.max_run_s`; 0.0 if none does."""
        return self._queue.stuck_s()

    def retry_after_s(self) -> int:
        """Estimated seconds, from 1 to 60, until the waiting rows have run."""
        return self._queue.retry_after_s()

    def close(self, *, timeout_s: float | None = None) -> bool:
        """Admit no more requests and finish those that were admitted.

        False if some were not finished within `timeout_s`; None waits as long as it takes.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        self._queue.close()
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        self._proofs.clear()
        return not any(thread.is_alive() for thread in self._threads)

    def _is_short(self, jobs: Sequence[Job]) -> bool:
        """Whether all of a request is a short run, as far as the costs say."""
        cost_s = 0.0
        for bucket, _ in jobs:
            if bucket.steady_s > self._short_run_s:
                return False
            cost_s += bucket.row_cost_s
        return cost_s <= self._short_run_s

    def _run_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let this loop run a batch in its next turn.

        By then the requests that arrived in this turn have been admitted: they share the batch.
        """
        if loop not in self._loops_to_run:
            self._loops_to_run.add(loop)
            loop.call_soon(self._run_in_loop, loop)

    def _run_in_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run a short batch in the event loop, and leave what it cannot run to the threads."""
        self._loops_to_run.discard(loop)
        batch = self._queue.next_batch_within(self._short_run_s)
        if batch is None:
            return
        # The time of this thread alone: other processes may take the processor away from it.
        started_s = time.thread_time()
        self._run(batch)
        if time.thread_time() - started_s > _LONGEST_LOOP_RUN_S:
            # Its costs do not say how long it takes. From now on its rows are for the threads.
            batch.bucket.distrust()
        # The next batch in the next turn: what has arrived meanwhile comes first.
        if batch.under_load:
            self._run_soon(loop)
        if len(self._proofs) or (batch.under_load and len(self._threads) > 1):
            self._queue.wake_thread()

    def _serve(self) -> None:
        while self._step():
            pass

    def _step(self) -> bool:
        """Do one piece of work; False if the thread must end."""
        # Not inside the loop above: there a local variable would keep the rows of the last batch
        # alive while the thread waits for the next one.
        work = self._queue.next_work()
        if isinstance(work, Batch):
            self._run(work)
        elif isinstance(work, PendingProof):
            self._prove(work)
        return work is not None

    def _run(self, batch: Batch) -> None:
        """Run a batch and deliver its outcomes.

        1. If the model answers, each row has an answer, or an exception of its own.
        2. If the model fails on the rows of one request, that request fails.
        3. If it fails on the rows of several requests, each row runs again, alone. So only the
           requests at fault fail.
        """
        began = self._clock()
        try:
            outcomes = run_filled(batch.bucket, batch.rows, size=batch.size)
        except BaseException as error:
            # SystemExit too: the thread must live on, and its callers must get an error.
            failure = as_request_error(error)
        else:
            run_s = self._clock() - began
            if batch.bucket.learns:
                batch.bucket.learn(run_s)
            rows = batch.rows
            # Before the callers are woken: traces add spans to requests that are still open.
            if self._observers:
                ran = RanBatch(
                    bucket=batch.bucket,
                    rows=rows,
                    size=batch.size,
                    waited_s=[began - entry.ticket.arrived for entry in batch.entries],
                    run_s=run_s,
                )
                for observer in self._observers:
                    notify(observer.batch_ran, ran)
            # Before the callers are woken: they may change their answers.
            try:
                self._proofs.sample(batch.bucket, rows, outcomes, batch_size=batch.size)
            except Exception:
                # The answers are valid all the same.
                _log.exception("an answer could not be sampled for its proof")
            self._queue.deliver(batch, outcomes, run_s=run_s)
            return

        if not batch.is_shared:
            self._queue.deliver(batch, [failure] * len(batch.entries))
        # The traceback of the failure refers to this frame: without `del` they are a cycle.
        del failure
        if batch.is_shared:
            for single in batch.single_rows():
                if self._queue.restart_run(single.entries[0].ticket):
                    self._run(single)

    def _prove(self, proof: PendingProof) -> None:
        """Run a proof and report its result. A row that cannot be run again proves nothing."""
        try:
            violation = self._proofs.prove(proof)
        except BaseException:
            _log.exception(
                "a row of bucket %s/%s could not be run again for its proof",
                proof.bucket.model,
                proof.bucket.label,
            )
            return
        if violation is not None and proof.bucket.fall_back():
            _log.error(
                "the proof of model %s does not hold here: its batches of bucket %s run only at"
                " measured sizes, and with rows of one length, from now on",
                proof.bucket.model,
                proof.bucket.label,
            )
        for observer in self._observers:
            notify(observer.proved, proof.bucket, violation)
