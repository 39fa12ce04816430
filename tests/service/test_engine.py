"""The engine's rules one by one, with rows that are numbers: the answer of a row is ten times itself."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import Sequence

import pytest

from evalmode.service.engine import Limits
from evalmode.service.errors import BodyTooLarge, DeadlineExceeded, InvalidField, NotReady, QueueFull, RunFailed
from tests.service.engine_fakes import (
    WAIT_S,
    Held,
    Notes,
    Number,
    Recorded,
    bucket_of,
    engine_of,
    jobs_of,
    one_thread_held,
    start_engine,
)


async def asked(engine, *requests, timeout_s=None) -> list[asyncio.Task]:
    """The requests, each in a task of its own, all of them waiting in the queue in this order."""
    tasks = [asyncio.create_task(engine.answer_async(jobs, timeout_s=timeout_s)) for jobs in requests]
    await asyncio.sleep(0)
    return tasks


def blocking(engine, jobs, *, timeout_s) -> list[int]:
    return engine.answer(jobs, timeout_s=timeout_s)


def awaited(engine, jobs, *, timeout_s) -> list[int]:
    return asyncio.run(engine.answer_async(jobs, timeout_s=timeout_s))


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
        assert engine.answer(jobs_of(bucket_of(run, costs={4: 1.0}), [1, 2, 3, 4, 5])) == [10, 20, 30, 40, 50]
    assert run.batches == [[1, 2, 3, 4], [5, 5, 5, 5]]
    assert notes.ran == [("8", [1, 2, 3, 4], 4), ("8", [5], 4)]


def test_the_earliest_deadline_goes_first_and_takes_rows_of_its_bucket_with_it():
    run = Recorded()
    short, long = bucket_of(run, label="8", costs={2: 1.0}), bucket_of(run, label="32", costs={1: 1.0})

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
    patient, pressing = bucket_of(run, label="patient"), bucket_of(run, label="pressing", costs={1: 1.0})

    async def ask(engine, release) -> None:
        tasks = await asked(engine, jobs_of(patient, [1, 2]))  # no deadline at all
        now[0] = 899.0
        tasks += await asked(engine, jobs_of(pressing, [3]), timeout_s=100.0)
        now[0] = 901.0
        tasks += await asked(engine, jobs_of(pressing, [4]), timeout_s=100.0)
        release()
        await asyncio.gather(*tasks)

    with one_thread_held(clock=lambda: now[0], limits=Limits(patience_s=1000.0)) as (engine, release):
        asyncio.run(ask(engine, release))
    assert run.batches == [[3], [1, 2], [4]]


def test_no_bucket_starves_under_a_stream_of_pressing_rows_in_another():
    """Batches of 0.1 s and a patience of 1 s: at most eleven go before it, with the one that runs when it comes."""
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
                asyncio.run_coroutine_threadsafe(one_more(), loop).result(WAIT_S)  # waits before this one has ended
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
        assert refusal.value.retry_after_s == 15  # three rows at the five seconds that the bucket's costs say
        assert engine.load.waiting_rows == 3
        first += await asked(engine, jobs_of(bucket, [4]))
        release()
        assert await asyncio.gather(*first) == [[10, 20, 30], [40]]

    with one_thread_held(limits=Limits(queue_rows=4), observers=[notes]) as (engine, release):
        asyncio.run(ask(engine, release))
    assert notes.dropped == [("queue_full", "8", 2)]


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
        with pytest.raises(BodyTooLarge, match=r"5 rows of 40 bytes.*4 rows of 100 bytes: split it"):
            engine.answer(jobs_of(bucket_of(), [1, 2, 3, 4, 5]))
        with pytest.raises(BodyTooLarge, match="split it"):
            engine.answer([(bucket_of(), Number(1, nbytes=101))])
        with pytest.raises(BodyTooLarge, match="split it"):
            asyncio.run(engine.wait_for_room(5))


@pytest.mark.parametrize("name", ["queue_rows", "queue_bytes", "max_run_s", "patience_s"])
def test_a_limit_that_is_not_above_zero_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        Limits(**{name: 0})


def test_no_threads_are_refused_by_name():
    with pytest.raises(ValueError, match="parallel is 0"):
        start_engine(parallel=0)


# Deadlines and cancellations.


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan")])
def test_no_time_at_all_is_refused_at_once_and_never_run(timeout_s):
    run, notes = Recorded(), Notes()
    with engine_of(observers=[notes]) as engine:
        with pytest.raises(DeadlineExceeded):
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
            assert asyncio.run(engine.answer_async(jobs_of(bucket_of(), [1]), timeout_s=timeout_s)) == [10]


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
        tasks = await asked(engine, jobs_of(bucket, [1, 2]), timeout_s=500)  # by a clock that no timer knows
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
        leaving, staying = await asked(engine, jobs_of(short, [1, 2]) + jobs_of(long, [3]), jobs_of(short, [4]))
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


# Failures.


def test_a_failing_row_fails_its_own_request_with_the_cause_and_the_engine_goes_on():
    notes = Notes()
    bucket = bucket_of(Recorded())
    with engine_of(observers=[notes]) as engine:
        with pytest.raises(RunFailed) as failure:
            engine.answer(jobs_of(bucket, [13]))
        assert isinstance(failure.value.__cause__, ArithmeticError)
        assert engine.answer(jobs_of(bucket, [14])) == [140]
    assert notes.dropped == [("failed", "8", 1)]


def test_of_requests_that_shared_a_batch_only_the_guilty_one_fails():
    run, notes = Recorded(), Notes()
    bucket = bucket_of(run, costs={2: 9.0, 4: 1.0})

    async def ask(engine, release) -> list:
        tasks = await asked(engine, jobs_of(bucket, [1]), jobs_of(bucket, [13]), jobs_of(bucket, [2, 3]))
        release()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with one_thread_held(observers=[notes]) as (engine, release):
        first, guilty, last = asyncio.run(ask(engine, release))
    assert (first, last) == ([10], [20, 30])
    assert isinstance(guilty, RunFailed)
    assert isinstance(guilty.__cause__, ArithmeticError)
    assert run.batches == [[1, 13, 2, 3], [1, 1], [13, 13], [2, 2], [3, 3]]
    assert notes.dropped == [("failed", "8", 1)]


def test_of_a_batch_that_failed_no_row_is_run_again_that_is_late_or_whose_request_has_failed_already():
    now = [0.0]
    ran = Recorded()

    def run(rows: Sequence[Number]) -> list[int]:
        now[0] += 100.0
        return list(ran(rows))

    bucket = bucket_of(run, costs={1: 9.0, 4: 1.0})

    async def ask(engine, release) -> list:
        tasks = await asked(engine, jobs_of(bucket, [13, 1]), timeout_s=900)
        tasks += await asked(engine, jobs_of(bucket, [2]), timeout_s=150)  # past when its turn to run again comes
        tasks += await asked(engine, jobs_of(bucket, [3]), timeout_s=900)
        release()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with one_thread_held(clock=lambda: now[0]) as (engine, release):
        guilty, late, answered = asyncio.run(ask(engine, release))
    assert (type(guilty), type(late), answered) == (RunFailed, DeadlineExceeded, [30])
    assert ran.batches == [[13, 1, 2, 3], [13], [3]]


def test_rows_of_one_request_that_failed_together_are_not_run_again():
    run = Recorded()
    with engine_of() as engine, pytest.raises(RunFailed):
        engine.answer(jobs_of(bucket_of(run, costs={4: 1.0}), [1, 13, 2, 3]))
    assert run.batches == [[1, 13, 2, 3]]


def test_on_its_first_failure_the_other_rows_of_a_request_leave_the_queue():
    run, notes = Recorded(), Notes()
    with engine_of(observers=[notes]) as engine:
        with pytest.raises(RunFailed):
            engine.answer(jobs_of(bucket_of(run, costs={1: 1.0}), [1, 13, 2, 3]))
        assert engine.load.waiting_rows == 0
    assert run.batches == [[1], [13]]
    assert notes.dropped == [("failed", "8", 4)]


def test_an_exception_in_the_place_of_an_answer_fails_that_row_s_request_alone():
    def run(rows: Sequence[Number]) -> list[int | Exception]:
        return [InvalidField("no", field="inputs.0") if row.value == 13 else row.value for row in rows]

    bucket = bucket_of(run, costs={4: 1.0})

    async def ask(engine, release) -> list:
        tasks = await asked(engine, jobs_of(bucket, [1]), jobs_of(bucket, [13]), jobs_of(bucket, [2]))
        release()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with one_thread_held() as (engine, release):
        first, guilty, last = asyncio.run(ask(engine, release))
    assert (first, last) == ([1], [2])
    assert isinstance(guilty, InvalidField)


def test_a_sentence_that_run_has_for_the_caller_reaches_him_as_it_is():
    def run(rows: Sequence[Number]) -> list[int]:
        raise InvalidField("this row cannot be answered", field="inputs.0")

    with engine_of() as engine, pytest.raises(InvalidField, match="this row cannot"):
        engine.answer(jobs_of(bucket_of(run), [1]))


@pytest.mark.parametrize("answers", [[], [1, 2, 3], None])
def test_a_run_that_answers_another_number_of_rows_fails_them(answers):
    with engine_of() as engine:
        with pytest.raises(RunFailed):
            engine.answer(jobs_of(bucket_of(lambda rows: answers), [1]))
        assert engine.answer(jobs_of(bucket_of(), [1])) == [10]


def test_a_run_that_would_end_its_thread_fails_its_rows_and_the_thread_lives():
    def run(rows: Sequence[Number]) -> list[int]:
        raise SystemExit(3)

    with engine_of() as engine:
        with pytest.raises(RunFailed):
            engine.answer(jobs_of(bucket_of(run), [1]))
        assert engine.answer(jobs_of(bucket_of(), [1])) == [10]


def test_an_observer_that_raises_holds_nobody_up(caplog):
    class Broken(Notes):
        def batch_ran(self, *args, **kwargs) -> None:
            raise ValueError("broken")

        rows_dropped = batch_ran

    notes = Notes()
    with engine_of(observers=[Broken(), notes]) as engine:
        assert engine.answer(jobs_of(bucket_of(), [1])) == [10]
        with pytest.raises(RunFailed):
            engine.answer(jobs_of(bucket_of(Recorded()), [13]))
    assert notes.ran == [("8", [1], 1)]
    assert notes.dropped == [("failed", "8", 1)]
    assert "an observer of the engine failed" in caplog.text


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
            assert engine.answer(jobs_of(bucket, [2])) == [20]  # by then the thread has left the others behind
            assert [ref() for ref in gone] == [None, None]
        finally:
            gc.enable()


def test_it_says_what_waits_and_what_runs():
    async def ask(engine, release) -> None:
        tasks = await asked(engine, jobs_of(bucket_of(), [1, 2, 3]))
        load = engine.load
        assert (load.waiting_rows, load.waiting_bytes, load.running_batches, load.parallel) == (3, 24, 1, 1)
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
