"""The engine with fake rows: a row is a number, its key is its number of digits, its answer ten times itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalmode.service.engine import Engine, cut
from evalmode.service.errors import InvalidField, NotReady, RunFailed


class Run:
    """Answers rows and remembers the batches; a row 13 makes it fail."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, rows: Sequence[int]) -> list[int]:
        self.batches.append(list(rows))
        if 13 in rows:
            raise ArithmeticError("thirteen")
        return [row * 10 for row in rows]


def engine_of(run, *, row_counts=(1, 2, 4), workers=2) -> Engine[int, int]:
    counts = dict.fromkeys(range(1, 5), row_counts)
    return Engine(run, key=lambda row: len(str(row)), row_counts=counts, workers=workers)


@given(st.lists(st.integers(min_value=100, max_value=9999) | st.integers(min_value=14, max_value=99)))
def test_answers_come_in_the_order_of_the_rows_whatever_their_keys(rows):
    run = Run()
    engine = engine_of(run)
    assert engine.answer(rows) == [row * 10 for row in rows]
    engine.close()


@given(st.lists(st.integers(min_value=14, max_value=9999), min_size=1))
def test_a_batch_has_one_key_and_an_allowed_size(rows):
    run = Run()
    engine = engine_of(run, row_counts=(1, 3))
    engine.answer(rows)
    engine.close()
    for batch in run.batches:
        assert len(batch) in (1, 3)
        assert len({len(str(row)) for row in batch}) == 1


def test_where_no_allowed_size_is_small_enough_a_batch_is_filled_with_copies():
    run = Run()
    engine = engine_of(run, row_counts=(4,))
    assert engine.answer([21, 22, 23, 24, 25]) == [210, 220, 230, 240, 250]
    engine.close()
    assert sorted(run.batches) == [[21, 22, 23, 24], [25, 25, 25, 25]]


@given(
    st.integers(min_value=0, max_value=500),
    st.sets(st.sampled_from([1, 2, 3, 4, 8, 16, 32]), min_size=1).map(tuple),
)
def test_a_cut_holds_every_row_and_is_never_a_batch_too_long(rows, allowed):
    sizes = cut(rows, allowed)
    assert set(sizes) <= set(allowed)
    assert sum(sizes) >= rows
    assert sum(sizes[:-1]) < rows or not sizes
    assert all(earlier >= later for earlier, later in pairwise(sizes))


def test_a_failing_batch_fails_its_own_callers_and_the_engine_goes_on():
    engine = engine_of(Run())
    with pytest.raises(RunFailed) as failure:
        engine.answer([13])
    assert isinstance(failure.value.__cause__, ArithmeticError)
    assert engine.answer([14]) == [140]
    engine.close()


def test_a_request_of_several_batches_fails_whole_when_one_of_them_fails():
    engine = engine_of(Run(), row_counts=(1,))
    with pytest.raises(RunFailed):
        engine.answer([14, 15, 13, 16])
    with pytest.raises(RunFailed):
        asyncio.run(engine.answer_async([14, 15, 13, 16]))
    engine.close()


def test_a_sentence_that_run_has_for_the_caller_reaches_him():
    def run(rows: Sequence[int]) -> list[int]:
        raise InvalidField("this row cannot be answered", field="inputs.0")

    engine = engine_of(run)
    with pytest.raises(InvalidField, match="this row cannot"):
        engine.answer([1])
    engine.close()


def test_two_batches_run_at_once_on_two_workers():
    meeting = threading.Barrier(2, timeout=20)

    def run(rows: Sequence[int]) -> list[int]:
        meeting.wait()
        return list(rows)

    engine = engine_of(run, row_counts=(1,), workers=2)
    assert engine.answer([14, 15]) == [14, 15]
    engine.close()


def test_awaiting_an_answer_leaves_the_event_loop_free():
    opened = threading.Event()

    def run(rows: Sequence[int]) -> list[int]:
        assert opened.wait(20)
        return list(rows)

    async def ask_then_open() -> list[int]:
        asked = asyncio.create_task(engine.answer_async([1, 2]))
        await asyncio.sleep(0)  # the task has begun; a blocked loop would never come back from here
        opened.set()
        return await asked

    engine = engine_of(run)
    assert asyncio.run(ask_then_open()) == [1, 2]
    engine.close()


def test_closing_finishes_what_was_started_and_takes_nothing_more():
    begun, opened = threading.Event(), threading.Event()

    def run(rows: Sequence[int]) -> list[int]:
        begun.set()
        assert opened.wait(20)
        return list(rows)

    engine = engine_of(run)
    found: list[list[int]] = []
    caller = threading.Thread(target=lambda: found.append(engine.answer([5])))
    caller.start()
    assert begun.wait(20)
    closing = threading.Thread(target=engine.close)
    closing.start()
    opened.set()
    closing.join(20)
    caller.join(20)
    assert found == [[5]]
    with pytest.raises(NotReady):
        engine.answer([6])


def test_no_rows_have_no_answers():
    engine = engine_of(Run())
    assert engine.answer([]) == []
    assert asyncio.run(engine.answer_async([])) == []
    engine.close()
