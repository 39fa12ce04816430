"""Deadlines and cancelled callers: rows leave at once, never run late, and block no others."""

from __future__ import annotations

import asyncio

import pytest

from evalmode.service.errors import DeadlineExceeded
from tests.service.batching.engine_fakes import (
    WAIT_S,
    BlockedRun,
    RecordingObserver,
    RecordingRun,
    bucket_of,
    busy_engine,
    engine_of,
    jobs_of,
    queued,
)


def blocking(engine, jobs, *, timeout_s) -> list[int]:
    return engine.answer(jobs, timeout_s=timeout_s)


def awaited(engine, jobs, *, timeout_s) -> list[int]:
    return asyncio.run(engine.answer_async(jobs, timeout_s=timeout_s))


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan")])
def test_a_timeout_of_zero_or_less_is_refused_at_once_and_never_run(timeout_s):
    run, observer = RecordingRun(), RecordingObserver()
    with engine_of(observers=[observer]) as engine:
        with pytest.raises(DeadlineExceeded, match="request reached its deadline"):
            engine.answer(jobs_of(bucket_of(run), [1, 2]), timeout_s=timeout_s)
        with pytest.raises(DeadlineExceeded):
            asyncio.run(engine.answer_async(jobs_of(bucket_of(run), [1]), timeout_s=timeout_s))
    assert run.batches == []
    assert observer.dropped == [("deadline", "8", 2), ("deadline", "8", 1)]


@pytest.mark.parametrize("timeout_s", [None, 1e30, float("inf")])
def test_a_timeout_may_be_missing_very_long_or_infinite(timeout_s):
    with engine_of() as engine:
        assert engine.answer(jobs_of(bucket_of(), [1]), timeout_s=timeout_s) == [10]
        if timeout_s != 1e30:  # a timer of an event loop takes at most some centuries
            assert asyncio.run(
                engine.answer_async(jobs_of(bucket_of(), [1]), timeout_s=timeout_s)
            ) == [10]


@pytest.mark.parametrize("ask", [blocking, awaited])
def test_at_the_deadline_waiting_rows_leave_and_are_never_run(ask):
    run, observer = RecordingRun(), RecordingObserver()
    jobs = jobs_of(bucket_of(run), [1, 2])
    with busy_engine(observers=[observer]) as (engine, release):
        with pytest.raises(DeadlineExceeded):
            ask(engine, jobs, timeout_s=0.02)
        assert (engine.load.waiting_rows, engine.load.waiting_bytes) == (0, 0)
        release()
    assert run.batches == []
    assert observer.dropped == [("deadline", "8", 2)]


@pytest.mark.parametrize("ask", [blocking, awaited])
def test_a_deadline_during_the_run_fails_the_request_and_its_answer_is_dropped(ask):
    blocked, observer = BlockedRun(), RecordingObserver()
    jobs = jobs_of(bucket_of(blocked), [1])
    with engine_of(observers=[observer]) as engine:
        with pytest.raises(DeadlineExceeded):
            ask(engine, jobs, timeout_s=0.02)
        assert blocked.begun.is_set()
        assert engine.load.running_batches == 1
        blocked.release.set()
        assert engine.answer(jobs_of(bucket_of(), [2])) == [20]
    assert observer.dropped == [("deadline", "8", 1)]


def test_a_row_past_its_deadline_is_not_started_even_if_no_timer_has_fired():
    now = [0.0]
    run, observer = RecordingRun(), RecordingObserver()
    bucket = bucket_of(run, costs={1: 3.0, 4: 4.0})

    async def ask(engine, release) -> list:
        # The engine has a clock of its own, so no timer fires.
        tasks = await queued(engine, jobs_of(bucket, [1, 2]), timeout_s=500)
        tasks += await queued(engine, jobs_of(bucket, [3]), timeout_s=900)
        now[0] = 500.0
        release()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with busy_engine(observers=[observer], clock=lambda: now[0]) as (engine, release):
        late, answered = asyncio.run(ask(engine, release))
    assert isinstance(late, DeadlineExceeded)
    assert answered == [30]
    assert run.batches == [[3]]  # at the batch size that is cheapest for the row that was left
    assert observer.dropped == [("deadline", "8", 2)]


def test_the_rows_of_a_cancelled_caller_leave_the_queue_at_once():
    run, observer = RecordingRun(), RecordingObserver()
    short, long = bucket_of(run), bucket_of(run, label="32")

    async def ask(engine, release) -> None:
        leaving, staying = await queued(
            engine, jobs_of(short, [1, 2]) + jobs_of(long, [3]), jobs_of(short, [4])
        )
        assert engine.load.waiting_rows == 4
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert (engine.load.waiting_rows, engine.load.waiting_bytes) == (1, 8)
        release()
        assert await staying == [40]

    with busy_engine(observers=[observer]) as (engine, release):
        asyncio.run(ask(engine, release))
    assert run.batches == [[4]]
    assert observer.dropped == [("cancelled", "8", 2), ("cancelled", "32", 1)]


def test_a_caller_whose_event_loop_is_closed_does_not_block_others():
    blocked = BlockedRun()
    bucket = bucket_of(blocked, costs={2: 1.0})
    with engine_of() as engine:
        loop = asyncio.new_event_loop()
        orphan = loop.create_task(engine.answer_async(jobs_of(bucket, [1])))
        loop.run_until_complete(asyncio.sleep(0))
        assert blocked.begun.wait(WAIT_S)
        orphan._log_destroy_pending = False  # this is what the test is about
        loop.close()
        blocked.release.set()
        assert engine.answer(jobs_of(bucket, [2])) == [20]
