"""Rows that are numbers, runs that can be held and wedged, and an observer that writes down what it
is told.
"""

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
    value: int
    nbytes: int = 8
    tokens: int = 1

    def description(self) -> str:
        return hashlib.sha256(str(self.value).encode()).hexdigest()


def tenfold(rows: Sequence[Number]) -> list[int]:
    return [row.value * 10 for row in rows]


@dataclass
class Recorded:
    """Answers with `answer` and remembers its batches; 13 is the row that fails it."""

    answer: Callable[[Sequence[Number]], Sequence[Any]] = tenfold
    batches: list[list[int]] = field(default_factory=list)

    def __call__(self, rows: Sequence[Number]) -> Sequence[Any]:
        self.batches.append([row.value for row in rows])
        if any(row.value == 13 for row in rows):
            raise ArithmeticError("thirteen")
        return self.answer(rows)


class Held(Recorded):
    """The first run is held until `release`; `begun` says that it is under way. The others run
    through.
    """

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
class Notes:
    """What an engine told."""

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
    run: Callable[[Sequence[Number]], Sequence[Any]] = tenfold,
    *,
    label: str = "8",
    costs: Mapping[int, float] | None = None,
) -> Bucket:
    return Bucket(model="m", version="1", label=label, positions=8, run=run, costs=costs or COSTS)


def start_engine(*, parallel: int = 1, **settings: Any) -> Engine:
    content = settings.pop("content", lambda answer: repr(answer).encode())
    return Engine(
        parallel=parallel,
        content=content,
        **settings,
    )


@contextmanager
def engine_of(*, parallel: int = 1, **settings: Any) -> Iterator[Engine]:
    """An engine that must have ended by itself when the test has."""
    engine = start_engine(parallel=parallel, **settings)
    yield engine
    assert engine.close(timeout_s=WAIT_S)


@contextmanager
def one_thread_held(**settings: Any) -> Iterator[tuple[Engine, Callable[[], None]]]:
    """An engine of one thread, which is busy until the given function is called: what is asked
    meanwhile waits.
    """
    held = Held()
    with engine_of(limits=settings.pop("limits", Limits()), **settings) as engine:
        asked = in_thread(lambda: engine.answer([(bucket_of(held, label="held"), Number(0))]))
        assert held.begun.wait(WAIT_S)
        try:
            yield engine, held.release.set
        finally:
            held.release.set()
            asked.join(WAIT_S)


def in_thread(call: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def jobs_of(bucket: Bucket, values: Sequence[int]) -> list[tuple[Bucket, Number]]:
    return [(bucket, Number(value)) for value in values]


async def asked(engine, *requests, timeout_s=None) -> list[asyncio.Task]:
    """The requests, each in a task of its own, all of them waiting in the queue in this order."""
    tasks = [
        asyncio.create_task(engine.answer_async(jobs, timeout_s=timeout_s)) for jobs in requests
    ]
    await asyncio.sleep(0)
    return tasks
