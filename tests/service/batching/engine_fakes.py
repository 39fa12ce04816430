"""Rows that are numbers, runs that can be blocked, and an observer that records what it is told."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from evalmode.service.batching.bucket import Bucket
from evalmode.service.batching.engine import Engine
from evalmode.service.batching.limits import Limits
from evalmode.service.batching.proof import Violation

WAIT_S = 30.0
COSTS = {1: 1.0, 2: 1.4, 4: 2.0}


@dataclass(frozen=True)
class Number:
    """A row."""

    value: int
    nbytes: int = 8
    tokens: int = 1

    def description(self) -> str:
        return hashlib.sha256(str(self.value).encode()).hexdigest()


def times_ten(rows: Sequence[Number]) -> list[int]:
    return [row.value * 10 for row in rows]


@dataclass
class RecordingRun:
    """Answers with `answer` and records its batches. A batch with the row 13 fails."""

    answer: Callable[[Sequence[Number]], Sequence[Any]] = times_ten
    batches: list[list[int]] = field(default_factory=list)

    def __call__(self, rows: Sequence[Number]) -> Sequence[Any]:
        self.batches.append([row.value for row in rows])
        if any(row.value == 13 for row in rows):
            raise ArithmeticError("thirteen")
        return self.answer(rows)


class BlockedRun(RecordingRun):
    """The first run sets `begun` and blocks until `release` is set. Later runs do not block."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Event()
        self.release = threading.Event()

    def __call__(self, rows: Sequence[Number]) -> Sequence[Any]:
        if not self.begun.is_set():
            self.begun.set()
            assert self.release.wait(WAIT_S)
        return super().__call__(rows)


@dataclass
class RecordingObserver:
    """Records the reports of an engine.

    Attributes:
        ran: label, row values and size of each batch.
        waited_s: the waits of all rows.
        dropped: reason, label and number of the dropped rows.
        proofs: the result of each proof.
        proved_once: set at each proof.
    """

    ran: list[tuple[str, list[int], int]] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    dropped: list[tuple[str, str, int]] = field(default_factory=list)
    proofs: list[Violation | None] = field(default_factory=list)
    proved_once: threading.Event = field(default_factory=threading.Event)

    def batch_ran(self, batch) -> None:
        self.ran.append((batch.bucket.label, [row.value for row in batch.rows], batch.size))
        self.waited_s += batch.waited_s

    def rows_dropped(self, reason, bucket, rows) -> None:
        self.dropped.append((reason, bucket.label, rows))

    def proved(self, bucket, violation) -> None:
        self.proofs.append(violation)
        self.proved_once.set()


def bucket_of(
    run: Callable[[Sequence[Number]], Sequence[Any]] = times_ten,
    *,
    label: str = "8",
    costs: Mapping[int, float] | None = None,
    positions: int = 8,
    pads_rows: bool = False,
) -> Bucket:
    return Bucket(
        model="m",
        version="1",
        label=label,
        positions=positions,
        run=run,
        costs=costs or COSTS,
        pads_rows=pads_rows,
    )


def start_engine(*, parallel: int = 1, **arguments: Any) -> Engine:
    content = arguments.pop("content", lambda answer: repr(answer).encode())
    return Engine(parallel=parallel, content=content, **arguments)


@contextmanager
def engine_of(*, parallel: int = 1, **arguments: Any) -> Iterator[Engine]:
    """An engine. At the end of the test all its requests must be done."""
    engine = start_engine(parallel=parallel, **arguments)
    yield engine
    assert engine.close(timeout_s=WAIT_S)


@contextmanager
def busy_engine(**arguments: Any) -> Iterator[tuple[Engine, Callable[[], None]]]:
    """An engine with one thread, which is busy until the second result is called.

    Requests that are sent before that wait in the queue.
    """
    run = BlockedRun()
    with engine_of(limits=arguments.pop("limits", Limits()), **arguments) as engine:
        caller = in_thread(lambda: engine.answer([(bucket_of(run, label="busy"), Number(0))]))
        assert run.begun.wait(WAIT_S)
        try:
            yield engine, run.release.set
        finally:
            run.release.set()
            caller.join(WAIT_S)


def in_thread(call: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def jobs_of(bucket: Bucket, values: Sequence[int]) -> list[tuple[Bucket, Number]]:
    return [(bucket, Number(value)) for value in values]


async def queued(engine, *requests, timeout_s=None) -> list[asyncio.Task]:
    """A task for each request, when all of them wait in the queue in this order."""
    tasks = [
        asyncio.create_task(engine.answer_async(jobs, timeout_s=timeout_s)) for jobs in requests
    ]
    await asyncio.sleep(0)
    return tasks
