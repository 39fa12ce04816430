"""The engine's rules one by one, with rows that are numbers: the answer of a row is ten times
itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import Sequence

import pytest

from evalmode.service.batching.limits import Limits
from evalmode.service.errors import BodyTooLarge, NotReady, QueueFull, RunFailed
from tests.service.batching.engine_fakes import (
    WAIT_S,
    Held,
    Notes,
    Number,
    Recorded,
    asked,
    bucket_of,
    engine_of,
    in_thread,
    jobs_of,
    one_thread_held,
    start_engine,
    tenfold,
)


def test_answers_come_in_the_order_of_the_rows_whatever_their_buckets():
    short, long = bucket_of(label="8"), bucket_of(label="32")
    jobs = [(short if value % 3 else long, Number(value)) for value in range(20)]
    with engine_of(parallel=2) as engine:
        assert engine.answer(jobs) == [value * 10 for value in range(20)]
        assert asyncio.run(engine.answer_async(jobs)) == [value * 10 for value in range(20)]


def test_no_rows_have_no_answers():
    with engine_of() as engine:
        assert engine.answer([]) == []
        assert asyncio.run(engine.answer_async([])) == []


def test_a_lone_row_runs_at_once_and_alone():
    run = Recorded()
    with engine_of() as engine:
        assert engine.answer(jobs_of(bucket_of(run), [5])) == [50]
    assert run.batches == [[5]]


def test_rows_that_gather_while_the_thread_is_busy_go_together():
    run, notes = Recorded(), Notes()
    bucket = bucket_of(run)

    async def ask(engine, release) -> list:
        tasks = await asked(engine, *(jobs_of(bucket, [value]) for value in range(4)))
        release()
        return await asyncio.gather(*tasks)

    with one_thread_held(observers=[notes]) as (engine, release):
        assert asyncio.run(ask(engine, release)) == [[0], [10], [20], [30]]
    assert run.batches == [[0, 1, 2, 3]]
    assert notes.ran[1:] == [("8", [0, 1, 2, 3], 4)]


def test_idle_threads_share_what_waits():
    meeting = threading.Barrier(2, timeout=WAIT_S)

    def run(rows: Sequence[Number]) -> list[int]:
        meeting.wait()  # both halves are under way at once
        return [len(rows)] * len(rows)

    with engine_of(parallel=2) as engine:
        assert engine.answer(jobs_of(bucket_of(run), [1, 2, 3, 4])) == [2, 2, 2, 2]


def test_where_no_smaller_row_count_may_run_a_batch_is_filled_with_copies_of_its_last_row():
    run, notes = Recorded(), Notes()
    with engine_of(observers=[notes]) as engine:
        assert engine.answer(jobs_of(bucket_of(run, costs={4: 1.0}), [1, 2, 3, 4, 5])) == [
            10,
            20,
            30,
            40,
            50,
        ]
    assert run.batches == [[1, 2, 3, 4], [5, 5, 5, 5]]
    assert notes.ran == [("8", [1, 2, 3, 4], 4), ("8", [5], 4)]


def test_the_earliest_deadline_goes_first_and_takes_rows_of_its_bucket_with_it():
    run = Recorded()
    short, long = (
        bucket_of(run, label="8", costs={2: 1.0}),
        bucket_of(run, label="32", costs={1: 1.0}),
    )

    async def ask(engine, release) -> None:
        tasks = await asked(engine, jobs_of(short, [1]), timeout_s=90)
        tasks += await asked(engine, jobs_of(long, [2]), timeout_s=80)
        tasks += await asked(engine, jobs_of(short, [3]), timeout_s=70)
        release()
        await asyncio.gather(*tasks)

    with one_thread_held(limits=Limits(patience_s=100.0)) as (engine, release):
        asyncio.run(ask(engine, release))
    assert run.batches == [[3, 1], [2]]


def test_nothing_that_came_patience_later_goes_first_however_early_its_deadline():
    now = [0.0]
    run = Recorded()
    patient, pressing = (
        bucket_of(run, label="patient"),
        bucket_of(run, label="pressing", costs={1: 1.0}),
    )

    async def ask(engine, release) -> None:
        tasks = await asked(engine, jobs_of(patient, [1, 2]))  # no deadline at all
        now[0] = 899.0
        tasks += await asked(engine, jobs_of(pressing, [3]), timeout_s=100.0)
        now[0] = 901.0
        tasks += await asked(engine, jobs_of(pressing, [4]), timeout_s=100.0)
        release()
        await asyncio.gather(*tasks)

    with one_thread_held(clock=lambda: now[0], limits=Limits(patience_s=1000.0)) as (
        engine,
        release,
    ):
        asyncio.run(ask(engine, release))
    assert run.batches == [[3], [1, 2], [4]]


def test_no_bucket_starves_under_a_stream_of_pressing_rows_in_another():
    """Batches of 0.1 s and a patience of 1 s: at most eleven go before it, with the one that runs
    when it comes.
    """
    now, ran = [0.0], Recorded()
    patient = bucket_of(ran)

    async def stream(engine) -> None:
        loop = asyncio.get_running_loop()
        tasks = []

        async def one_more() -> None:
            tasks.extend(await asked(engine, jobs_of(pressing, [0]), timeout_s=0.4))

        def run_pressing(rows: Sequence[Number]) -> list[int]:
            now[0] += 0.1
            if [1] not in ran.batches and len(ran.batches) < 50:
                # waits before this one has ended
                asyncio.run_coroutine_threadsafe(one_more(), loop).result(WAIT_S)
            return list(ran(rows))

        pressing = bucket_of(run_pressing, label="pressing", costs={1: 1.0})
        await one_more()
        await one_more()
        assert await engine.answer_async(jobs_of(patient, [1])) == [10]
        await asyncio.gather(*tasks, return_exceptions=True)

    with engine_of(clock=lambda: now[0], limits=Limits(patience_s=1.0)) as engine:
        asyncio.run(stream(engine))
    assert 5 <= ran.batches.index([1]) <= 11


# Bounds.


def test_a_request_that_does_not_fit_whole_is_refused_whole_with_a_time_to_come_again():
    notes = Notes()
    bucket = bucket_of(costs={1: 5.0})

    async def ask(engine, release) -> None:
        first = await asked(engine, jobs_of(bucket, [1, 2, 3]))
        with pytest.raises(QueueFull, match="no room for 2 more rows") as refusal:
            await engine.answer_async(jobs_of(bucket, [4, 5]))
        # three rows at the five seconds that the bucket's costs say
        assert refusal.value.retry_after_s == 15
        assert engine.load.waiting_rows == 3
        first += await asked(engine, jobs_of(bucket, [4]))
        release()
        assert await asyncio.gather(*first) == [[10, 20, 30], [40]]

    with one_thread_held(limits=Limits(queue_rows=4), observers=[notes]) as (engine, release):
        asyncio.run(ask(engine, release))
    assert notes.dropped == [("queue_full", "8", 2)]


def test_who_would_have_to_wait_too_long_is_refused_and_who_comes_first_is_not():
    bucket = bucket_of(costs={1: 1.0})
    with one_thread_held(limits=Limits(queue_s=2.5)) as (engine, release):

        async def ask() -> list[object]:
            tasks = await asked(
                engine, *[jobs_of(bucket, values) for values in ([1], [2, 3], [4], [5])]
            )
            release()
            return await asyncio.gather(*tasks, return_exceptions=True)

        one, two, refused, after = asyncio.run(ask())
        assert (one, two) == ([10], [20, 30]), "0 and then 1 s of rows were before them"
        assert isinstance(refused, QueueFull), "3 s of rows were before it"
        assert isinstance(after, QueueFull)
        assert engine.answer(jobs_of(bucket, range(20, 40))) == [row * 10 for row in range(20, 40)]


def test_rows_are_let_in_again_once_batches_are_quick_again():
    now, took_s = [0.0], [10.0]

    def run(rows):
        now[0] += took_s[0]
        return tenfold(rows)

    bucket, held = bucket_of(run, costs={1: 0.01}), Held()

    async def ask() -> list[object]:
        tasks = await asked(engine, *[jobs_of(bucket, [value]) for value in range(5)])
        held.release.set()
        return await asyncio.gather(*tasks)

    with engine_of(limits=Limits(queue_s=1.0), clock=lambda: now[0]) as engine:
        engine.answer(jobs_of(bucket, [1, 2]))  # the first is held up while the second waits
        took_s[0] = 0.01
        for value in range(100):  # none of which leaves another waiting
            engine.answer(jobs_of(bucket, [value]))
        first = in_thread(lambda: engine.answer(jobs_of(bucket_of(held, label="held"), [0])))
        assert held.begun.wait(WAIT_S)
        assert asyncio.run(ask()) == [[value * 10] for value in range(5)]
        first.join(WAIT_S)


def test_the_queue_is_bounded_in_bytes_too():
    bucket = bucket_of()

    async def ask(engine, release) -> None:
        first = await asked(engine, [(bucket, Number(1, nbytes=70))])
        with pytest.raises(QueueFull):
            await engine.answer_async([(bucket, Number(2, nbytes=31))])
        assert engine.load.waiting_bytes == 70
        release()
        assert await first[0] == [10]

    with one_thread_held(limits=Limits(queue_bytes=100)) as (engine, release):
        asyncio.run(ask(engine, release))


def test_a_request_larger_than_the_whole_queue_is_told_to_split():
    with engine_of(limits=Limits(queue_rows=4, queue_bytes=100)) as engine:
        with pytest.raises(
            BodyTooLarge, match=r"5 rows of 40 bytes.*4 rows of 100 bytes: split it"
        ):
            engine.answer(jobs_of(bucket_of(), [1, 2, 3, 4, 5]))
        with pytest.raises(BodyTooLarge, match="split it"):
            engine.answer([(bucket_of(), Number(1, nbytes=101))])
        with pytest.raises(BodyTooLarge, match="split it"):
            asyncio.run(engine.wait_for_room(5))


def test_no_threads_are_refused_by_name():
    with pytest.raises(ValueError, match="parallel is 0"):
        start_engine(parallel=0)


# What it says of itself, and its end.


def test_a_request_that_was_answered_or_failed_is_kept_nowhere():
    row, poison = Number(1), Number(13)
    gone = [weakref.ref(row), weakref.ref(poison)]
    with engine_of(parallel=1) as engine:
        bucket = bucket_of(Recorded())
        gc.collect()
        gc.disable()  # nothing may be left to it
        try:
            assert engine.answer([(bucket, row)]) == [10]
            with contextlib.suppress(RunFailed):
                engine.answer([(bucket, poison)])
            del row, poison
            # by then the thread has left the others behind
            assert engine.answer(jobs_of(bucket, [2])) == [20]
            assert [ref() for ref in gone] == [None, None]
        finally:
            gc.enable()


def test_it_says_what_waits_and_what_runs():
    async def ask(engine, release) -> None:
        tasks = await asked(engine, jobs_of(bucket_of(), [1, 2, 3]))
        load = engine.load
        assert (load.waiting_rows, load.waiting_bytes, load.running_batches, load.parallel) == (
            3,
            24,
            1,
            1,
        )
        release()
        await asyncio.gather(*tasks)
        load = engine.load
        assert (load.waiting_rows, load.waiting_bytes, load.running_batches) == (0, 0, 0)

    with one_thread_held() as (engine, release):
        asyncio.run(ask(engine, release))


def test_a_run_beyond_its_bound_is_stuck_until_it_comes_back():
    now = [0.0]
    with one_thread_held(clock=lambda: now[0], limits=Limits(max_run_s=30.0)) as (engine, release):
        now[0] = 30.0
        assert engine.stuck_s() == 0.0
        now[0] = 33.5
        assert engine.stuck_s() == 3.5
        release()
        assert engine.answer(jobs_of(bucket_of(), [1])) == [10]
        assert engine.stuck_s() == 0.0


def test_a_run_says_how_long_its_rows_had_waited():
    now, notes = [0.0], Notes()

    async def ask(engine, release) -> None:
        tasks = await asked(engine, jobs_of(bucket_of(), [1]))
        now[0] = 2.5
        tasks += await asked(engine, jobs_of(bucket_of(), [2]))
        release()
        await asyncio.gather(*tasks)

    with one_thread_held(clock=lambda: now[0], observers=[notes]) as (engine, release):
        asyncio.run(ask(engine, release))
    assert notes.waited_s == [0.0, 2.5, 0.0]


def test_closing_answers_what_was_accepted_and_takes_nothing_more():
    bucket = bucket_of()

    async def ask(engine, release) -> None:
        tasks = await asked(engine, *(jobs_of(bucket, [value]) for value in range(9)))
        assert engine.close(timeout_s=0.0) is False
        with pytest.raises(NotReady, match="stopping"):
            await engine.answer_async(jobs_of(bucket, [9]))
        release()
        assert await asyncio.gather(*tasks) == [[value * 10] for value in range(9)]
        assert await asyncio.to_thread(engine.close, timeout_s=WAIT_S) is True

    with one_thread_held() as (engine, release):
        asyncio.run(ask(engine, release))
        with pytest.raises(NotReady, match="stopping"):
            engine.answer(jobs_of(bucket, [1]))


def test_closing_says_when_a_run_has_not_come_back_in_time():
    with one_thread_held() as (engine, release):
        assert engine.close(timeout_s=0.02) is False
        release()
        assert engine.close(timeout_s=WAIT_S) is True
