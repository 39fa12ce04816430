"""A failure fails its own request, all of it and no other, and the engine goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from evalmode.service.errors import DeadlineExceeded, InvalidField, RunFailed
from tests.service.batching.engine_fakes import (
    Number,
    RecordingObserver,
    RecordingRun,
    bucket_of,
    busy_engine,
    engine_of,
    jobs_of,
    queued,
)


def test_a_failing_row_fails_its_own_request_with_the_cause_and_the_engine_goes_on():
    observer = RecordingObserver()
    bucket = bucket_of(RecordingRun())
    with engine_of(observers=[observer]) as engine:
        with pytest.raises(RunFailed) as failure:
            engine.answer(jobs_of(bucket, [13]))
        assert isinstance(failure.value.__cause__, ArithmeticError)
        assert engine.answer(jobs_of(bucket, [14])) == [140]
    assert observer.dropped == [("failed", "8", 1)]


def test_of_requests_that_share_a_batch_only_the_one_at_fault_fails():
    run, observer = RecordingRun(), RecordingObserver()
    bucket = bucket_of(run, costs={2: 9.0, 4: 1.0})

    async def ask(engine, release) -> list:
        tasks = await queued(
            engine, jobs_of(bucket, [1]), jobs_of(bucket, [13]), jobs_of(bucket, [2, 3])
        )
        release()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with busy_engine(observers=[observer]) as (engine, release):
        first, guilty, last = asyncio.run(ask(engine, release))
    assert (first, last) == ([10], [20, 30])
    assert isinstance(guilty, RunFailed)
    assert isinstance(guilty.__cause__, ArithmeticError)
    assert run.batches == [[1, 13, 2, 3], [1, 1], [13, 13], [2, 2], [3, 3]]
    assert observer.dropped == [("failed", "8", 1)]


def test_after_a_failed_batch_rows_that_are_late_or_whose_request_failed_are_not_run_again():
    now = [0.0]
    ran = RecordingRun()

    def run(rows: Sequence[Number]) -> list[int]:
        now[0] += 100.0
        return list(ran(rows))

    bucket = bucket_of(run, costs={1: 9.0, 4: 1.0})

    async def ask(engine, release) -> list:
        tasks = await queued(engine, jobs_of(bucket, [13, 1]), timeout_s=900)
        # Its deadline has passed when it would run again.
        tasks += await queued(engine, jobs_of(bucket, [2]), timeout_s=150)
        tasks += await queued(engine, jobs_of(bucket, [3]), timeout_s=900)
        release()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with busy_engine(clock=lambda: now[0]) as (engine, release):
        guilty, late, answered = asyncio.run(ask(engine, release))
    assert (type(guilty), type(late), answered) == (RunFailed, DeadlineExceeded, [30])
    assert ran.batches == [[13, 1, 2, 3], [13], [3]]


def test_rows_of_one_request_that_failed_together_are_not_run_again():
    run = RecordingRun()
    with engine_of() as engine, pytest.raises(RunFailed):
        engine.answer(jobs_of(bucket_of(run, costs={4: 1.0}), [1, 13, 2, 3]))
    assert run.batches == [[1, 13, 2, 3]]


def test_on_its_first_failure_the_other_rows_of_a_request_leave_the_queue():
    run, observer = RecordingRun(), RecordingObserver()
    with engine_of(observers=[observer]) as engine:
        with pytest.raises(RunFailed):
            engine.answer(jobs_of(bucket_of(run, costs={1: 1.0}), [1, 13, 2, 3]))
        assert engine.load.waiting_rows == 0
    assert run.batches == [[1], [13]]
    assert observer.dropped == [("failed", "8", 4)]


def test_an_exception_instead_of_an_answer_fails_only_the_request_of_that_row():
    def run(rows: Sequence[Number]) -> list[int | Exception]:
        return [
            InvalidField("no", field="inputs.0") if row.value == 13 else row.value for row in rows
        ]

    bucket = bucket_of(run, costs={4: 1.0})

    async def ask(engine, release) -> list:
        tasks = await queued(
            engine, jobs_of(bucket, [1]), jobs_of(bucket, [13]), jobs_of(bucket, [2])
        )
        release()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with busy_engine() as (engine, release):
        first, guilty, last = asyncio.run(ask(engine, release))
    assert (first, last) == ([1], [2])
    assert isinstance(guilty, InvalidField)


def test_a_request_error_of_run_reaches_the_caller_unchanged():
    def run(rows: Sequence[Number]) -> list[int]:
        raise InvalidField("this row cannot be answered", field="inputs.0")

    with engine_of() as engine, pytest.raises(InvalidField, match="this row cannot"):
        engine.answer(jobs_of(bucket_of(run), [1]))


@pytest.mark.parametrize("answers", [[], [1, 2, 3], None])
def test_a_run_with_a_wrong_number_of_answers_fails_its_rows(answers):
    with engine_of() as engine:
        with pytest.raises(RunFailed):
            engine.answer(jobs_of(bucket_of(lambda rows: answers), [1]))
        assert engine.answer(jobs_of(bucket_of(), [1])) == [10]


def test_a_run_that_raises_system_exit_fails_its_rows_and_the_thread_lives():
    def run(rows: Sequence[Number]) -> list[int]:
        raise SystemExit(3)

    with engine_of() as engine:
        with pytest.raises(RunFailed):
            engine.answer(jobs_of(bucket_of(run), [1]))
        assert engine.answer(jobs_of(bucket_of(), [1])) == [10]


def test_an_observer_that_raises_is_logged_and_the_engine_goes_on(caplog):
    class Broken(RecordingObserver):
        def batch_ran(self, *args, **kwargs) -> None:
            raise ValueError("broken")

        rows_dropped = batch_ran

    observer = RecordingObserver()
    with engine_of(observers=[Broken(), observer]) as engine:
        assert engine.answer(jobs_of(bucket_of(), [1])) == [10]
        with pytest.raises(RunFailed):
            engine.answer(jobs_of(bucket_of(RecordingRun()), [13]))
    assert observer.ran == [("8", [1], 1)]
    assert observer.dropped == [("failed", "8", 1)]
    assert "an observer of the engine failed" in caplog.text
