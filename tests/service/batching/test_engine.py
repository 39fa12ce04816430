"""The engine's rules one by one, with rows that are numbers. The answer of a row is ten times its
value.
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
    BlockedRun,
    Number,
    RecordingObserver,
    RecordingRun,
    bucket_of,
    busy_engine,
    engine_of,
    in_thread,
    jobs_of,
    queued,
    start_engine,
    times_ten,
)


def test_answers_have_the_order_of_the_rows_whatever_their_buckets():
    short, long = bucket_of(label="8"), bucket_of(label="32")
    jobs = [(short if value % 3 else long, Number(value)) for value in range(20)]
    with engine_of(parallel=2) as engine:
        assert engine.answer(jobs) == [value * 10 for value in range(20)]
        assert asyncio.run(engine.answer_async(jobs)) == [value * 10 for value in range(20)]


def test_no_rows_have_no_answers():
    with engine_of() as engine:
        assert engine.answer([]) == []
        assert asyncio.run(engine.answer_async([])) == []


def test_a_single_row_runs_at_once_and_alone():
    run = RecordingRun()
    with engine_of() as engine:
        assert engine.answer(jobs_of(bucket_of(run), [5])) == [50]
    assert run.batches == [[5]]


def test_rows_that_arrive_while_the_thread_is_busy_run_together():
    run, observer = RecordingRun(), RecordingObserver()
    bucket = bucket_of(run)

    async def ask(engine, release) -> list:
        tasks = await queued(engine, *(jobs_of(bucket, [value]) for value in range(4)))
        release()
        return await asyncio.gather(*tasks)

    with busy_engine(observers=[observer]) as (engine, release):
        assert asyncio.run(ask(engine, release)) == [[0], [10], [20], [30]]
    assert run.batches == [[0, 1, 2, 3]]
    assert observer.ran[1:] == [("8", [0, 1, 2, 3], 4)]


def test_idle_threads_share_the_waiting_rows():
    meeting = threading.Barrier(2, timeout=WAIT_S)

    def run(rows: Sequence[Number]) -> list[int]:
        meeting.wait()  # both threads must run at the same time
        return [len(rows)] * len(rows)

    with engine_of(parallel=2) as engine:
        assert engine.answer(jobs_of(bucket_of(run), [1, 2, 3, 4])) == [2, 2, 2, 2]


def test_without_a_smaller_allowed_size_a_batch_is_filled_with_copies_of_its_last_row():
    run, observer = RecordingRun(), RecordingObserver()
    with engine_of(observers=[observer]) as engine:
        assert engine.answer(jobs_of(bucket_of(run, costs={4: 1.0}), [1, 2, 3, 4, 5])) == [
            10,
            20,
            30,
            40,
            50,
        ]
    assert run.batches == [[1, 2, 3, 4], [5, 5, 5, 5]]
    assert observer.ran == [("8", [1, 2, 3, 4], 4), ("8", [5], 4)]


def test_the_row_with_the_earliest_deadline_runs_first_with_other_rows_of_its_bucket():
    run = RecordingRun()
    short, long = (
        bucket_of(run, label="8", costs={2: 1.0}),
        bucket_of(run, label="32", costs={1: 1.0}),
    )

    async def ask(engine, release) -> None:
        tasks = await queued(engine, jobs_of(short, [1]), timeout_s=90)
        tasks += await queued(engine, jobs_of(long, [2]), timeout_s=80)
        tasks += await queued(engine, jobs_of(short, [3]), timeout_s=70)
        release()
        await asyncio.gather(*tasks)

    with busy_engine(limits=Limits(patience_s=100.0)) as (engine, release):
        asyncio.run(ask(engine, release))
    assert run.batches == [[3, 1], [2]]


def test_a_row_that_arrives_patience_s_later_never_runs_first_however_early_its_deadline():
    now = [0.0]
    run = RecordingRun()
    patient, urgent = (
        bucket_of(run, label="patient"),
        bucket_of(run, label="urgent", costs={1: 1.0}),
    )

    async def ask(engine, release) -> None:
        tasks = await queued(engine, jobs_of(patient, [1, 2]))  # without a deadline
        now[0] = 899.0
        tasks += await queued(engine, jobs_of(urgent, [3]), timeout_s=100.0)
        now[0] = 901.0
        tasks += await queued(engine, jobs_of(urgent, [4]), timeout_s=100.0)
        release()
        await asyncio.gather(*tasks)

    with busy_engine(clock=lambda: now[0], limits=Limits(patience_s=1000.0)) as (
        engine,
        release,
    ):
        asyncio.run(ask(engine, release))
    assert run.batches == [[3], [1, 2], [4]]


def test_no_bucket_starves_under_a_stream_of_urgent_rows_in_another():
    """With batches of 0.1 s and a patience of 1 s, at most eleven batches run before the patient
    row: the one that runs when it arrives, and ten more.
    """
    now, ran = [0.0], RecordingRun()
    patient = bucket_of(ran)

    async def stream(engine) -> None:
        loop = asyncio.get_running_loop()
        tasks = []

        async def send_urgent() -> None:
            tasks.extend(await queued(engine, jobs_of(urgent, [0]), timeout_s=0.4))

        def run_urgent(rows: Sequence[Number]) -> list[int]:
            now[0] += 0.1
            if [1] not in ran.batches and len(ran.batches) < 50:
                # The next row waits before this batch has ended.
                asyncio.run_coroutine_threadsafe(send_urgent(), loop).result(WAIT_S)
            return list(ran(rows))

        urgent = bucket_of(run_urgent, label="urgent", costs={1: 1.0})
        await send_urgent()
        await send_urgent()
        assert await engine.answer_async(jobs_of(patient, [1])) == [10]
        await asyncio.gather(*tasks, return_exceptions=True)

    with engine_of(clock=lambda: now[0], limits=Limits(patience_s=1.0)) as engine:
        asyncio.run(stream(engine))
    assert 5 <= ran.batches.index([1]) <= 11


# Bounds.


def test_a_request_that_does_not_fit_is_refused_as_a_whole_with_a_time_to_retry():
    observer = RecordingObserver()
    bucket = bucket_of(costs={1: 5.0})

    async def ask(engine, release) -> None:
        first = await queued(engine, jobs_of(bucket, [1, 2, 3]))
        with pytest.raises(QueueFull, match="no room for 2 more rows") as refusal:
            await engine.answer_async(jobs_of(bucket, [4, 5]))
        # Three rows of five seconds each, by the costs of the bucket.
        assert refusal.value.retry_after_s == 15
        assert engine.load.waiting_rows == 3
        first += await queued(engine, jobs_of(bucket, [4]))
        release()
        assert await asyncio.gather(*first) == [[10, 20, 30], [40]]

    with busy_engine(limits=Limits(queue_rows=4), observers=[observer]) as (engine, release):
        asyncio.run(ask(engine, release))
    assert observer.dropped == [("queue_full", "8", 2)]


def test_a_request_that_would_wait_too_long_is_refused_and_the_first_one_never():
    bucket = bucket_of(costs={1: 1.0})
    with busy_engine(limits=Limits(queue_s=2.5)) as (engine, release):

        async def ask() -> list[object]:
            tasks = await queued(
                engine, *[jobs_of(bucket, values) for values in ([1], [2, 3], [4], [5])]
            )
            release()
            return await asyncio.gather(*tasks, return_exceptions=True)

        first, second, third, fourth = asyncio.run(ask())
        assert (first, second) == ([10], [20, 30]), "0 s and 1 s of rows were before them"
        assert isinstance(third, QueueFull), "3 s of rows were before it"
        assert isinstance(fourth, QueueFull)
        assert engine.answer(jobs_of(bucket, range(20, 40))) == [row * 10 for row in range(20, 40)]


def test_rows_are_admitted_again_once_batches_are_quick_again():
    now, took_s = [0.0], [10.0]

    def run(rows):
        now[0] += took_s[0]
        return times_ten(rows)

    bucket, blocked = bucket_of(run, costs={1: 0.01}), BlockedRun()

    async def ask() -> list[object]:
        tasks = await queued(engine, *[jobs_of(bucket, [value]) for value in range(5)])
        blocked.release.set()
        return await asyncio.gather(*tasks)

    with engine_of(limits=Limits(queue_s=1.0), clock=lambda: now[0]) as engine:
        engine.answer(jobs_of(bucket, [1, 2]))  # the first is slow, and the second waits
        took_s[0] = 0.01
        for value in range(100):  # none of them leaves another waiting
            engine.answer(jobs_of(bucket, [value]))
        first = in_thread(lambda: engine.answer(jobs_of(bucket_of(blocked, label="blocked"), [0])))
        assert blocked.begun.wait(WAIT_S)
        assert asyncio.run(ask()) == [[value * 10] for value in range(5)]
        first.join(WAIT_S)


def test_the_queue_is_bounded_in_bytes_too():
    bucket = bucket_of()

    async def ask(engine, release) -> None:
        first = await queued(engine, [(bucket, Number(1, nbytes=70))])
        with pytest.raises(QueueFull):
            await engine.answer_async([(bucket, Number(2, nbytes=31))])
        assert engine.load.waiting_bytes == 70
        release()
        assert await first[0] == [10]

    with busy_engine(limits=Limits(queue_bytes=100)) as (engine, release):
        asyncio.run(ask(engine, release))


def test_a_request_larger_than_the_queue_is_refused_with_the_advice_to_split_it():
    with engine_of(limits=Limits(queue_rows=4, queue_bytes=100)) as engine:
        with pytest.raises(
            BodyTooLarge, match=r"5 rows of 40 bytes.*4 rows of 100 bytes: split it"
        ):
            engine.answer(jobs_of(bucket_of(), [1, 2, 3, 4, 5]))
        with pytest.raises(BodyTooLarge, match="split it"):
            engine.answer([(bucket_of(), Number(1, nbytes=101))])
        with pytest.raises(BodyTooLarge, match="split it"):
            asyncio.run(engine.wait_for_room(5))


def test_zero_threads_are_refused_by_name():
    with pytest.raises(ValueError, match="parallel is 0"):
        start_engine(parallel=0)


# What it reports, and its end.


def test_a_request_that_was_answered_or_failed_is_freed():
    row, poison = Number(1), Number(13)
    references = [weakref.ref(row), weakref.ref(poison)]
    with engine_of(parallel=1) as engine:
        bucket = bucket_of(RecordingRun())
        gc.collect()
        gc.disable()  # reference counts alone must free them
        try:
            assert engine.answer([(bucket, row)]) == [10]
            with contextlib.suppress(RunFailed):
                engine.answer([(bucket, poison)])
            del row, poison
            # When this is answered, the thread has dropped the others.
            assert engine.answer(jobs_of(bucket, [2])) == [20]
            assert [reference() for reference in references] == [None, None]
        finally:
            gc.enable()


def test_the_load_counts_waiting_rows_and_running_batches():
    async def ask(engine, release) -> None:
        tasks = await queued(engine, jobs_of(bucket_of(), [1, 2, 3]))
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

    with busy_engine() as (engine, release):
        asyncio.run(ask(engine, release))


def test_a_run_beyond_max_run_s_is_stuck_until_it_returns():
    now = [0.0]
    with busy_engine(clock=lambda: now[0], limits=Limits(max_run_s=30.0)) as (engine, release):
        now[0] = 30.0
        assert engine.stuck_s() == 0.0
        now[0] = 33.5
        assert engine.stuck_s() == 3.5
        release()
        assert engine.answer(jobs_of(bucket_of(), [1])) == [10]
        assert engine.stuck_s() == 0.0


def test_a_batch_reports_how_long_its_rows_waited():
    now, observer = [0.0], RecordingObserver()

    async def ask(engine, release) -> None:
        tasks = await queued(engine, jobs_of(bucket_of(), [1]))
        now[0] = 2.5
        tasks += await queued(engine, jobs_of(bucket_of(), [2]))
        release()
        await asyncio.gather(*tasks)

    with busy_engine(clock=lambda: now[0], observers=[observer]) as (engine, release):
        asyncio.run(ask(engine, release))
    assert observer.waited_s == [0.0, 2.5, 0.0]


def test_closing_answers_admitted_requests_and_admits_no_more():
    bucket = bucket_of()

    async def ask(engine, release) -> None:
        tasks = await queued(engine, *(jobs_of(bucket, [value]) for value in range(9)))
        assert engine.close(timeout_s=0.0) is False
        with pytest.raises(NotReady, match="stopping"):
            await engine.answer_async(jobs_of(bucket, [9]))
        release()
        assert await asyncio.gather(*tasks) == [[value * 10] for value in range(9)]
        assert await asyncio.to_thread(engine.close, timeout_s=WAIT_S) is True

    with busy_engine() as (engine, release):
        asyncio.run(ask(engine, release))
        with pytest.raises(NotReady, match="stopping"):
            engine.answer(jobs_of(bucket, [1]))


def test_closing_returns_false_if_a_run_does_not_return_in_time():
    with busy_engine() as (engine, release):
        assert engine.close(timeout_s=0.02) is False
        release()
        assert engine.close(timeout_s=WAIT_S) is True
