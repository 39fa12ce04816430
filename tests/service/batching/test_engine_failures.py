"""Whatever fails fails its own request, whole and alone, and the engine goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from evalmode.service.errors import DeadlineExceeded, InvalidField, RunFailed
from tests.service.batching.engine_fakes import (
    Notes,
    Number,
    Recorded,
    asked,
    bucket_of,
    engine_of,
    jobs_of,
    one_thread_held,
)


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
        tasks = await asked(
            engine, jobs_of(bucket, [1]), jobs_of(bucket, [13]), jobs_of(bucket, [2, 3])
        )
        release()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with one_thread_held(observers=[notes]) as (engine, release):
        first, guilty, last = asyncio.run(ask(engine, release))
    assert (first, last) == ([10], [20, 30])
    assert isinstance(guilty, RunFailed)
    assert isinstance(guilty.__cause__, ArithmeticError)
    assert run.batches == [[1, 13, 2, 3], [1, 1], [13, 13], [2, 2], [3, 3]]
    assert notes.dropped == [("failed", "8", 1)]


def test_of_a_batch_that_failed_no_row_is_run_again_that_is_late_or_whose_request_failed():
    now = [0.0]
    ran = Recorded()

    def run(rows: Sequence[Number]) -> list[int]:
        now[0] += 100.0
        return list(ran(rows))

    bucket = bucket_of(run, costs={1: 9.0, 4: 1.0})

    async def ask(engine, release) -> list:
        tasks = await asked(engine, jobs_of(bucket, [13, 1]), timeout_s=900)
        # past when its turn to run again comes
        tasks += await asked(engine, jobs_of(bucket, [2]), timeout_s=150)
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
        return [
            InvalidField("no", field="inputs.0") if row.value == 13 else row.value for row in rows
        ]

    bucket = bucket_of(run, costs={4: 1.0})

    async def ask(engine, release) -> list:
        tasks = await asked(
            engine, jobs_of(bucket, [1]), jobs_of(bucket, [13]), jobs_of(bucket, [2])
        )
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
