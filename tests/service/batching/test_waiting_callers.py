"""Waiting for room in the queue: first come first served, nobody forgotten, whoever leaves in
between.
"""

from __future__ import annotations

import asyncio

import pytest

from evalmode.service.batching.limits import Limits
from evalmode.service.batching.waiting_callers import WaitingCallers
from evalmode.service.errors import NotReady
from tests.service.batching.engine_fakes import (
    WAIT_S,
    bucket_of,
    engine_of,
    jobs_of,
    one_thread_held,
)

FOUR = Limits(queue_rows=4)


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def waiters(engine, *rows: int) -> list[asyncio.Task]:
    tasks = [asyncio.create_task(engine.wait_for_room(count)) for count in rows]
    await turns()
    return tasks


async def full(engine) -> asyncio.Task:
    task = asyncio.create_task(engine.answer_async(jobs_of(bucket_of(), [1, 2, 3, 4])))
    await turns()
    assert engine.load.waiting_rows == 4
    return task


def test_while_there_is_room_nobody_waits():
    with engine_of(limits=FOUR) as engine:
        asyncio.run(asyncio.wait_for(engine.wait_for_room(4), WAIT_S))


def test_it_returns_when_the_rows_would_be_admitted():
    async def ask(engine, release) -> None:
        filling = await full(engine)
        (waiter,) = await waiters(engine, 2)
        assert not waiter.done()
        release()
        await asyncio.wait_for(waiter, WAIT_S)
        assert await engine.answer_async(jobs_of(bucket_of(), [5, 6])) == [50, 60]
        await filling

    with one_thread_held(limits=FOUR) as (engine, release):
        asyncio.run(ask(engine, release))


def test_bytes_count_as_rows_do():
    async def ask(engine, release) -> None:
        filling = await full(engine)  # 32 bytes
        waiter = asyncio.create_task(engine.wait_for_room(1, nbytes=69))
        await turns()
        assert not waiter.done()
        release()
        await asyncio.wait_for(waiter, WAIT_S)
        await filling

    with one_thread_held(limits=Limits(queue_bytes=100)) as (engine, release):
        asyncio.run(ask(engine, release))


def test_nobody_passes_one_who_needs_more_and_came_before():
    async def ask(engine, _release) -> None:
        blocker = asyncio.create_task(engine.answer_async(jobs_of(bucket_of(), [1, 2])))
        await turns()
        large, small = await waiters(engine, 3, 1)
        await turns()
        assert not large.done()
        assert not small.done()  # one row would fit now
        blocker.cancel()
        await asyncio.wait_for(asyncio.gather(large, small), WAIT_S)

    with one_thread_held(limits=FOUR) as (engine, release):
        asyncio.run(ask(engine, release))


def test_he_who_is_woken_takes_his_room_before_the_next_is_woken():
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
            await turns()
        release()
        await asyncio.wait_for(asyncio.gather(filling, *streams), WAIT_S)
        return order

    with one_thread_held(limits=FOUR) as (engine, release):
        assert asyncio.run(ask(engine, release)) == list("abcdef")


def test_one_who_stops_waiting_holds_nobody_up():
    async def ask(engine, _release) -> None:
        blocker = asyncio.create_task(engine.answer_async(jobs_of(bucket_of(), [1, 2])))
        await turns()
        large, small = await waiters(engine, 3, 1)
        large.cancel()  # small fits, and nothing will ever leave the queue
        await asyncio.wait_for(small, WAIT_S)
        blocker.cancel()

    with one_thread_held(limits=FOUR) as (engine, release):
        asyncio.run(ask(engine, release))


def test_one_who_was_woken_and_cancelled_in_the_same_turn_passes_his_turn_on():
    async def ask(engine, _release) -> None:
        filling = await full(engine)
        first, second = await waiters(engine, 4, 4)
        filling.cancel()
        await asyncio.sleep(0)  # the rows have left, the first is about to be woken
        first.cancel()
        await asyncio.wait_for(second, WAIT_S)

    with one_thread_held(limits=FOUR) as (engine, release):
        asyncio.run(ask(engine, release))


def test_one_who_was_woken_and_does_not_come_leaves_the_room_to_the_next():
    async def ask(engine, _release) -> None:
        filling = await full(engine)
        first, second = await waiters(engine, 4, 4)
        filling.cancel()
        await asyncio.wait_for(asyncio.gather(first, second), WAIT_S)

    with one_thread_held(limits=FOUR) as (engine, release):
        asyncio.run(ask(engine, release))


@pytest.mark.parametrize("leave", ["deadline", "run"])
def test_room_is_offered_however_rows_leave(leave):
    async def ask(engine, release) -> None:
        timeout_s = 0.02 if leave == "deadline" else None
        filling = asyncio.create_task(
            engine.answer_async(jobs_of(bucket_of(), [1, 2, 3, 4]), timeout_s=timeout_s)
        )
        await turns()
        (waiter,) = await waiters(engine, 4)
        if leave == "run":
            release()
        await asyncio.wait_for(waiter, WAIT_S)
        await asyncio.gather(filling, return_exceptions=True)

    with one_thread_held(limits=FOUR) as (engine, release):
        asyncio.run(ask(engine, release))


def test_one_whose_event_loop_is_gone_holds_nobody_up():

    with one_thread_held(limits=FOUR) as (engine, release):
        gone = asyncio.new_event_loop()
        blocker = gone.create_task(engine.answer_async(jobs_of(bucket_of(), [1, 2, 3, 4])))
        orphan = gone.create_task(engine.wait_for_room(4))
        gone.run_until_complete(turns())
        for task in (orphan, blocker):
            task._log_destroy_pending = False  # it is what this test is about
        gone.close()

        async def wait() -> None:
            (waiter,) = await waiters(engine, 4)
            release()
            await asyncio.wait_for(waiter, WAIT_S)

        asyncio.run(wait())


def test_closing_tells_all_who_wait():
    async def ask(engine, release) -> None:
        filling = await full(engine)
        tasks = await waiters(engine, 1, 4)
        assert engine.close(timeout_s=0.0) is False
        found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), WAIT_S)
        assert [type(error) for error in found] == [NotReady, NotReady]
        with pytest.raises(NotReady):
            await engine.wait_for_room(1)
        release()
        assert await filling == [10, 20, 30, 40]

    with one_thread_held(limits=FOUR) as (engine, release):
        asyncio.run(ask(engine, release))


def test_while_one_has_his_turn_nobody_else_gets_one_and_nobody_comes_in_between():
    async def ask() -> None:
        first, second, third = (asyncio.get_running_loop().create_future() for _ in range(3))
        fitting = [False]
        room = WaitingCallers(lambda rows, nbytes: fitting[0])
        assert room.join(first, rows=1, nbytes=8)
        fitting[0] = True
        assert room.next() is first
        assert room.next() is None
        assert room.join(second, rows=1, nbytes=8)  # there is room, but the first has not taken his
        assert room.next() is None
        room.leave(first)
        assert room.next() is second
        room.leave(second)
        assert not room.join(third, rows=1, nbytes=8)

    asyncio.run(ask())
