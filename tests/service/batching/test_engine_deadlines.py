"""Deadlines and cancelled callers: rows leave at once, are never run late, and hold nobody up."""

from __future__ import annotations

import asyncio

import pytest

from evalmode.service.errors import DeadlineExceeded
from tests.service.batching.engine_fakes import (
    WAIT_S,
    Held,
    Notes,
    Recorded,
    asked,
    bucket_of,
    engine_of,
    jobs_of,
    one_thread_held,
)


def blocking(engine, jobs, *, timeout_s) -> list[int]:
    return engine.answer(jobs, timeout_s=timeout_s)


def awaited(engine, jobs, *, timeout_s) -> list[int]:
    return asyncio.run(engine.answer_async(jobs, timeout_s=timeout_s))


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan")])
def test_no_time_at_all_is_refused_at_once_and_never_run(timeout_s):
    run, notes = Recorded(), Notes()
    with engine_of(observers=[notes]) as engine:
        with pytest.raises(DeadlineExceeded, match="request reached its deadline"):
            engine.answer(jobs_of(bucket_of(run), [1, 2]), timeout_s=timeout_s)
        with pytest.raises(DeadlineExceeded):
            asyncio.run(engine.answer_async(jobs_of(bucket_of(run), [1]), timeout_s=timeout_s))
    assert run.batches == []
    assert notes.dropped == [("deadline", "8", 2), ("deadline", "8", 1)]


@pytest.mark.parametrize("timeout_s", [None, 1e30, float("inf")])
def test_as_much_time_as_it_takes_is_fine(timeout_s):
    with engine_of() as engine:
        assert engine.answer(jobs_of(bucket_of(), [1]), timeout_s=timeout_s) == [10]
        if timeout_s != 1e30:  # an event loop's clock goes to some centuries
            assert asyncio.run(
                engine.answer_async(jobs_of(bucket_of(), [1]), timeout_s=timeout_s)
            ) == [10]


@pytest.mark.parametrize("ask", [blocking, awaited])
def test_at_the_deadline_waiting_rows_leave_and_are_never_run(ask):
    run, notes = Recorded(), Notes()
    jobs = jobs_of(bucket_of(run), [1, 2])
    with one_thread_held(observers=[notes]) as (engine, release):
        with pytest.raises(DeadlineExceeded):
            ask(engine, jobs, timeout_s=0.02)
        assert (engine.load.waiting_rows, engine.load.waiting_bytes) == (0, 0)
        release()
    assert run.batches == []
    assert notes.dropped == [("deadline", "8", 2)]


@pytest.mark.parametrize("ask", [blocking, awaited])
def test_the_deadline_holds_while_the_run_is_under_way_and_its_answer_is_dropped(ask):
    held, notes = Held(), Notes()
    jobs = jobs_of(bucket_of(held), [1])
    with engine_of(observers=[notes]) as engine:
        with pytest.raises(DeadlineExceeded):
            ask(engine, jobs, timeout_s=0.02)
        assert held.begun.is_set()
        assert engine.load.running_batches == 1
        held.release.set()
        assert engine.answer(jobs_of(bucket_of(), [2])) == [20]
    assert notes.dropped == [("deadline", "8", 1)]


def test_a_row_past_its_deadline_is_not_started_even_when_no_timer_came_to_say_so():
    now = [0.0]
    run, notes = Recorded(), Notes()
    bucket = bucket_of(run, costs={1: 3.0, 4: 4.0})

    async def ask(engine, release) -> list:
        # by a clock that no timer knows
        tasks = await asked(engine, jobs_of(bucket, [1, 2]), timeout_s=500)
        tasks += await asked(engine, jobs_of(bucket, [3]), timeout_s=900)
        now[0] = 500.0
        release()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with one_thread_held(observers=[notes], clock=lambda: now[0]) as (engine, release):
        late, answered = asyncio.run(ask(engine, release))
    assert isinstance(late, DeadlineExceeded)
    assert answered == [30]
    assert run.batches == [[3]]  # of the row count that is cheapest for what was left
    assert notes.dropped == [("deadline", "8", 2)]


def test_a_cancelled_caller_takes_his_rows_out_at_once():
    run, notes = Recorded(), Notes()
    short, long = bucket_of(run), bucket_of(run, label="32")

    async def ask(engine, release) -> None:
        leaving, staying = await asked(
            engine, jobs_of(short, [1, 2]) + jobs_of(long, [3]), jobs_of(short, [4])
        )
        assert engine.load.waiting_rows == 4
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert (engine.load.waiting_rows, engine.load.waiting_bytes) == (1, 8)
        release()
        assert await staying == [40]

    with one_thread_held(observers=[notes]) as (engine, release):
        asyncio.run(ask(engine, release))
    assert run.batches == [[4]]
    assert notes.dropped == [("cancelled", "8", 2), ("cancelled", "32", 1)]


def test_a_caller_whose_event_loop_is_gone_holds_nobody_up():
    held = Held()
    bucket = bucket_of(held, costs={2: 1.0})
    with engine_of() as engine:
        loop = asyncio.new_event_loop()
        orphan = loop.create_task(engine.answer_async(jobs_of(bucket, [1])))
        loop.run_until_complete(asyncio.sleep(0))
        assert held.begun.wait(WAIT_S)
        orphan._log_destroy_pending = False  # it is what this test is about
        loop.close()
        held.release.set()
        assert engine.answer(jobs_of(bucket, [2])) == [20]
