"""How long a request waited in the engine and how long it ran, as the caller gets it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from evalmode.service.batching.limits import Limits
from evalmode.service.errors import DeadlineExceeded, QueueFull, RunFailed
from tests.service.batching.engine_fakes import (
    Number,
    bucket_of,
    busy_engine,
    engine_of,
    jobs_of,
    times_ten,
)


class Clock:
    """A clock that only tests and runs of a model advance."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def run(
        self, seconds: float, answer: Callable[[Sequence[Number]], Any] = times_ten
    ) -> Callable[[Sequence[Number]], Any]:
        """A run that takes `seconds`."""

        def run(rows: Sequence[Number]) -> Any:
            self.now_s += seconds
            return answer(rows)

        return run


def fails(rows: Sequence[Number]) -> Any:
    raise ArithmeticError("a failure of the tests")


async def times(engine: Any, jobs: Any, **limits: Any) -> list[tuple[float, float]]:
    calls: list[tuple[float, float]] = []
    await engine.answer_async(jobs, timed=lambda *seconds: calls.append(seconds), **limits)
    return calls


def test_a_request_alone_does_not_wait():
    clock = Clock()
    with engine_of(clock=clock) as engine:
        jobs = jobs_of(bucket_of(clock.run(2.0)), [1])
        assert asyncio.run(times(engine, jobs)) == [(0.0, 2.0)]


def test_wait_and_run_add_up_to_the_time_in_the_engine_also_with_many_batches():
    clock = Clock()
    bucket = bucket_of(clock.run(2.0), costs={1: 1.0})  # a batch for each row
    with engine_of(clock=clock) as engine:
        assert asyncio.run(times(engine, jobs_of(bucket, [1, 2, 3]))) == [(4.0, 2.0)]


def test_a_request_waits_while_others_run():
    clock = Clock()

    async def ask(engine: Any, release: Callable[[], None]) -> list[tuple[float, float]]:
        waiting = asyncio.create_task(times(engine, jobs_of(bucket_of(clock.run(2.0)), [1])))
        await asyncio.sleep(0)
        clock.now_s += 3.0
        release()
        return await waiting

    with busy_engine(clock=clock) as (engine, release):
        assert asyncio.run(ask(engine, release)) == [(3.0, 2.0)]


def test_a_request_that_fails_has_times_too():
    clock = Clock()
    calls: list[tuple[float, float]] = []
    with engine_of(clock=clock) as engine:
        jobs = jobs_of(bucket_of(clock.run(2.0, fails)), [1])
        with pytest.raises(RunFailed):
            asyncio.run(engine.answer_async(jobs, timed=lambda *seconds: calls.append(seconds)))
    assert calls == [(0.0, 2.0)]


def test_at_its_deadline_a_request_that_still_waits_has_only_waited():
    clock = Clock()
    calls: list[tuple[float, float]] = []

    async def ask(engine: Any) -> None:
        jobs = jobs_of(bucket_of(clock.run(2.0)), [1])
        waiting = asyncio.create_task(
            engine.answer_async(jobs, timeout_s=0.01, timed=lambda *seconds: calls.append(seconds))
        )
        await asyncio.sleep(0)
        clock.now_s += 3.0
        with pytest.raises(DeadlineExceeded):
            await waiting

    with busy_engine(clock=clock) as (engine, _):
        asyncio.run(ask(engine))
        assert calls == [(3.0, 0.0)]


def test_a_request_that_was_not_admitted_has_no_times():
    calls: list[tuple[float, float]] = []
    limits = Limits(queue_rows=1)
    with busy_engine(limits=limits) as (engine, _):

        async def ask() -> None:
            first = asyncio.create_task(engine.answer_async(jobs_of(bucket_of(), [1])))
            await asyncio.sleep(0)
            with pytest.raises(QueueFull):
                await engine.answer_async(
                    jobs_of(bucket_of(), [2]), timed=lambda *seconds: calls.append(seconds)
                )
            first.cancel()

        asyncio.run(ask())
    assert calls == []
