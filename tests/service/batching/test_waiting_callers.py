"""Waiting for room in the queue: first come first served. A caller that leaves blocks no others."""

from __future__ import annotations

import asyncio

import pytest

from evalmode.service.batching.limits import Limits
from evalmode.service.batching.waiting_callers import WaitingCallers
from evalmode.service.errors import NotReady
from tests.service.batching.engine_fakes import (
    WAIT_S,
    bucket_of,
    busy_engine,
    engine_of,
    jobs_of,
)

FOUR = Limits(queue_rows=4)


async def loop_steps(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def waiters(engine, *rows: int) -> list[asyncio.Task]:
    tasks = [asyncio.create_task(engine.wait_for_room(count)) for count in rows]
    await loop_steps()
    return tasks


async def full(engine) -> asyncio.Task:
    task = asyncio.create_task(engine.answer_async(jobs_of(bucket_of(), [1, 2, 3, 4])))
    await loop_steps()
    assert engine.load.waiting_rows == 4
    return task


def test_while_there_is_room_no_caller_waits():
    with engine_of(limits=FOUR) as engine:
        asyncio.run(asyncio.wait_for(engine.wait_for_room(4), WAIT_S))


def test_waiting_ends_when_the_rows_would_be_admitted():
    async def ask(engine, release) -> None:
        filling = await full(engine)
        (waiter,) = await waiters(engine, 2)
        assert not waiter.done()
        release()
        await asyncio.wait_for(waiter, WAIT_S)
        assert await engine.answer_async(jobs_of(bucket_of(), [5, 6])) == [50, 60]
        await filling

    with busy_engine(limits=FOUR) as (engine, release):
        asyncio.run(ask(engine, release))


def test_bytes_are_limited_as_rows_are():
    async def ask(engine, release) -> None:
        filling = await full(engine)  # 32 bytes
        waiter = asyncio.create_task(engine.wait_for_room(1, nbytes=69))
        await loop_steps()
        assert not waiter.done()
        release()
        await asyncio.wait_for(waiter, WAIT_S)
        await filling

    with busy_engine(limits=Limits(queue_bytes=100)) as (engine, release):
        asyncio.run(ask(engine, release))


def test_a_small_request_does_not_pass_a_large_one_that_waits_longer():
    async def ask(engine, _release) -> None:
        blocker = asyncio.create_task(engine.answer_async(jobs_of(bucket_of(), [1, 2])))
        await loop_steps()
        large, small = await waiters(engine, 3, 1)
        await loop_steps()
        assert not large.done()
        assert not small.done()  # although one row would fit now
        blocker.cancel()
        await asyncio.wait_for(asyncio.gather(large, small), WAIT_S)

    with busy_engine(limits=FOUR) as (engine, release):
        asyncio.run(ask(engine, release))


def test_a_woken_caller_uses_its_room_before_the_next_is_woken():
    async def stream(engine, name: str, order: list[str]) -> None:
        await engine.wait_for_room(3)
        order.append(name)
        await engine.answer_async(jobs_of(bucket_of(), [1, 2, 3]))  # never QueueFull

    async def ask(engine, release) -> list[str]:
        filling = await full(engine)
        order: list[str] = []
        streams = []
        for name in "abcdef":
            streams.append(asyncio.create_task(stream(engine, name, order)))
            await loop_steps()
        release()
        await asyncio.wait_for(asyncio.gather(filling, *streams), WAIT_S)
        return order

    with busy_engine(limits=FOUR) as (engine, release):
        assert asyncio.run(ask(engine, release)) == list("abcdef")


def test_a_cancelled_caller_does_not_block_the_next():
    async def ask(engine, _release) -> None:
        blocker = asyncio.create_task(engine.answer_async(jobs_of(bucket_of(), [1, 2])))
        await loop_steps()
        large, small = await waiters(engine, 3, 1)
        large.cancel()  # the small one fits, and no rows leave the queue
        await asyncio.wait_for(small, WAIT_S)
        blocker.cancel()

    with busy_engine(limits=FOUR) as (engine, release):
        asyncio.run(ask(engine, release))


def test_a_caller_that_is_woken_and_cancelled_in_one_step_passes_the_turn_on():
    async def ask(engine, _release) -> None:
        filling = await full(engine)
        first, second = await waiters(engine, 4, 4)
        filling.cancel()
        await asyncio.sleep(0)  # the rows have left, and the first will be woken next
        first.cancel()
        await asyncio.wait_for(second, WAIT_S)

    with busy_engine(limits=FOUR) as (engine, release):
        asyncio.run(ask(engine, release))


def test_a_woken_caller_that_sends_nothing_leaves_the_room_to_the_next():
    async def ask(engine, _release) -> None:
        filling = await full(engine)
        first, second = await waiters(engine, 4, 4)
        filling.cancel()
        await asyncio.wait_for(asyncio.gather(first, second), WAIT_S)

    with busy_engine(limits=FOUR) as (engine, release):
        asyncio.run(ask(engine, release))


@pytest.mark.parametrize("leave", ["deadline", "run"])
def test_room_is_offered_however_rows_leave(leave):
    async def ask(engine, release) -> None:
        timeout_s = 0.02 if leave == "deadline" else None
        filling = asyncio.create_task(
            engine.answer_async(jobs_of(bucket_of(), [1, 2, 3, 4]), timeout_s=timeout_s)
        )
        await loop_steps()
        (waiter,) = await waiters(engine, 4)
        if leave == "run":
            release()
        await asyncio.wait_for(waiter, WAIT_S)
        await asyncio.gather(filling, return_exceptions=True)

    with busy_engine(limits=FOUR) as (engine, release):
        asyncio.run(ask(engine, release))


def test_a_caller_on_a_closed_event_loop_does_not_block_the_next():

    with busy_engine(limits=FOUR) as (engine, release):
        closed_loop = asyncio.new_event_loop()
        blocker = closed_loop.create_task(engine.answer_async(jobs_of(bucket_of(), [1, 2, 3, 4])))
        orphan = closed_loop.create_task(engine.wait_for_room(4))
        closed_loop.run_until_complete(loop_steps())
        for task in (orphan, blocker):
            task._log_destroy_pending = False  # this is what the test is about
        closed_loop.close()

        async def wait() -> None:
            (waiter,) = await waiters(engine, 4)
            release()
            await asyncio.wait_for(waiter, WAIT_S)

        asyncio.run(wait())


def test_closing_raises_not_ready_for_all_waiting_callers():
    async def ask(engine, release) -> None:
        filling = await full(engine)
        tasks = await waiters(engine, 1, 4)
        assert engine.close(timeout_s=0.0) is False
        errors = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), WAIT_S)
        assert [type(error) for error in errors] == [NotReady, NotReady]
        with pytest.raises(NotReady):
            await engine.wait_for_room(1)
        release()
        assert await filling == [10, 20, 30, 40]

    with busy_engine(limits=FOUR) as (engine, release):
        asyncio.run(ask(engine, release))


def test_during_the_turn_of_a_caller_no_other_gets_one_and_none_enters():
    async def ask() -> None:
        first, second, third = (asyncio.get_running_loop().create_future() for _ in range(3))
        has_room = [False]
        callers = WaitingCallers(lambda rows, nbytes: has_room[0])
        assert callers.join(first, rows=1, nbytes=8)
        has_room[0] = True
        assert callers.next_caller() is first
        assert callers.next_caller() is None
        assert callers.join(
            second, rows=1, nbytes=8
        )  # there is room, but the first has not used its own
        assert callers.next_caller() is None
        callers.leave(first)
        assert callers.next_caller() is second
        callers.leave(second)
        assert not callers.join(third, rows=1, nbytes=8)

    asyncio.run(ask())
