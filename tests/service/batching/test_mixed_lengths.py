"""Rows of several lengths in one batch: when that is chosen, what runs, and how it is proved."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalmode.service.batching.bucket import Bucket, cheaper_together
from evalmode.service.batching.engine import Engine
from evalmode.service.errors import DeadlineExceeded, RunFailed
from tests.service.batching.engine_fakes import (
    WAIT_S,
    Number,
    RecordingObserver,
    RecordingRun,
    bucket_of,
    busy_engine,
    engine_of,
    jobs_of,
    queued,
    times_ten,
)

# A batch costs 10 whatever is in it, and each row 1 for every 4 positions.
ROWS = range(1, 9)


def costs_of(positions: int, *, batch: float = 10.0) -> dict[int, float]:
    return {rows: batch + rows * positions / 4 for rows in ROWS}


def ladder(run=times_ten, *, batch: float = 10.0, **arguments) -> dict[int, Bucket]:
    """Buckets of one proved model, by their length."""
    return {
        positions: bucket_of(
            run,
            label=str(positions),
            positions=positions,
            costs=costs_of(positions, batch=batch),
            pads_rows=True,
            **arguments,
        )
        for positions in (4, 8, 16, 32)
    }


def chosen(buckets: Mapping[int, Bucket], head: int, rows: Mapping[int, int]) -> list[int]:
    """The lengths that run with those of `head`, when so many rows wait at each length."""
    row_counts = {buckets[positions]: count for positions, count in rows.items()}
    return [bucket.positions for bucket in cheaper_together(buckets[head], row_counts)]


@pytest.mark.parametrize(
    ("head", "rows", "lengths"),
    [
        (8, {8: 1}, [8]),
        (4, {4: 1, 8: 1}, [4, 8]),  # 14 for 11 and 12
        (8, {4: 1, 8: 1}, [4, 8]),  # the most urgent row may be the longer one
        (4, {4: 1, 16: 1}, [4, 16]),  # 18 for 11 and 14
        (4, {4: 5, 32: 1}, [4]),  # 58 for 15 and 18
        (4, {4: 1, 8: 1, 16: 1}, [4, 8, 16]),  # 22 for 11, 12 and 14
        (4, {4: 6, 8: 1, 32: 1}, [4, 8]),  # 24 for 16 and 12; the long row by itself
        (32, {4: 6, 8: 1, 32: 1}, [8, 32]),  # 26 for 12 and 18; with six short rows 74 for 46
        (32, {16: 2, 32: 1}, [32]),  # 34 for 18 and 18 is not a tenth less
        (4, {4: 5, 8: 4}, [4]),  # no batch holds nine rows
        (4, {4: 9, 8: 1}, [4]),
    ],
)
def test_rows_of_several_lengths_run_together_where_that_takes_less_time(
    head: int, rows: dict[int, int], lengths: list[int]
) -> None:
    assert chosen(ladder(), head, rows) == lengths


def test_only_buckets_of_one_proved_model_share_a_batch() -> None:
    buckets, others = ladder(), ladder(lambda rows: times_ten(rows))
    row_counts = {buckets[4]: 1, others[8]: 1}
    assert cheaper_together(buckets[4], row_counts) == [buckets[4]]
    buckets[8].pads_rows = False
    assert chosen(buckets, 4, {4: 1, 8: 1}) == [4]
    assert chosen(buckets, 8, {4: 1, 8: 1}) == [8]


@given(
    st.dictionaries(st.sampled_from([4, 8, 16, 32]), st.integers(1, 9), min_size=1),
    st.floats(0.0, 100.0),
    st.data(),
)
def test_a_shared_batch_takes_at_most_nine_tenths_of_the_time(
    rows: dict[int, int], batch: float, data: st.DataObject
) -> None:
    head = data.draw(st.sampled_from(sorted(rows)))
    lengths = chosen(ladder(batch=batch), head, rows)
    assert head in lengths
    assert lengths == [length for length in sorted(rows) if lengths[0] <= length <= lengths[-1]]
    if len(lengths) > 1:
        apart = sum(costs_of(length, batch=batch)[rows[length]] for length in lengths)
        count = sum(rows[length] for length in lengths)
        assert costs_of(lengths[-1], batch=batch)[count] <= 0.9 * apart + 1e-9


def answers(*requests: list[tuple[Bucket, Number]], **arguments: Any) -> list[Any]:
    """The answers of requests that wait together in the queue of one thread, errors included."""

    async def ask(engine: Engine, release: Callable[[], None]) -> list[Any]:
        tasks = await queued(engine, *requests)
        release()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with busy_engine(**arguments) as (engine, release):
        return asyncio.run(ask(engine, release))


def test_waiting_rows_of_two_lengths_run_in_one_batch_of_the_longer_one() -> None:
    run, observer = RecordingRun(), RecordingObserver()
    buckets = ladder(run)
    requests = [
        jobs_of(buckets[8], [1, 5, 6]),
        [*jobs_of(buckets[4], [2, 3]), *jobs_of(buckets[32], [4])],
    ]
    assert answers(*requests, observers=[observer]) == [[10, 50, 60], [20, 30, 40]]
    assert run.batches == [[2, 3, 1, 5, 6], [4]]
    assert observer.ran[1:] == [("8", [2, 3, 1, 5, 6], 5), ("32", [4], 1)]


def test_a_row_past_its_deadline_leaves_a_smaller_batch() -> None:
    run, now = RecordingRun(), [0.0]
    buckets = ladder(run)

    async def ask(engine: Engine, release: Callable[[], None]) -> list[Any]:
        tasks = await queued(engine, jobs_of(buckets[8], [1]), timeout_s=50.0)
        tasks += await queued(engine, jobs_of(buckets[4], [2, 3]))
        now[0] = 60.0  # before the timer of the first request
        release()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with busy_engine(clock=lambda: now[0]) as (engine, release):
        late, in_time = asyncio.run(ask(engine, release))
    assert isinstance(late, DeadlineExceeded)
    assert in_time == [20, 30]
    assert run.batches == [[2, 3]]


def test_a_row_that_fails_in_a_shared_batch_fails_only_its_own_request() -> None:
    run = RecordingRun()
    buckets = ladder(run)
    good, bad = answers(jobs_of(buckets[4], [2]), jobs_of(buckets[8], [13]))
    assert good == [20]
    assert isinstance(bad, RunFailed)
    assert run.batches == [[2, 13], [2], [13]]


def test_with_a_free_thread_each_length_runs_by_itself() -> None:
    run = RecordingRun()
    buckets = ladder(run)
    with engine_of(parallel=3) as engine:
        jobs = [*jobs_of(buckets[4], [1]), *jobs_of(buckets[8], [2])]
        assert engine.answer(jobs, timeout_s=WAIT_S) == [10, 20]
    assert sorted(run.batches) == [[1], [2]]


def padding_counts(rows: Sequence[Number]) -> list[float]:
    """The fault that the proof is for: a row beside a longer one has another answer than alone.

    The value of a row is its length here.
    """
    longest = max(row.value for row in rows)
    return [row.value * 10 + (longest - row.value) / 100 for row in rows]


def test_a_violation_by_padding_is_found_and_ends_shared_batches(
    caplog: pytest.LogCaptureFixture,
) -> None:
    observer = RecordingObserver()
    buckets = ladder(padding_counts)
    for bucket in buckets.values():
        bucket.measured_costs = bucket.costs
    jobs = [*jobs_of(buckets[4], [4]), *jobs_of(buckets[8], [8])]
    with engine_of(proof_fraction=1.0, observers=[observer]) as engine:
        assert engine.answer(jobs, timeout_s=WAIT_S) == [40.04, 80]
        while len(observer.proofs) < 2:
            assert observer.proved_once.wait(WAIT_S)
            observer.proved_once.clear()
        # From now on the long bucket takes no rows of others.
        assert engine.answer(jobs, timeout_s=WAIT_S) == [40, 80]
    (violation,) = [proof for proof in observer.proofs[:2] if proof is not None]
    assert (violation.bucket, violation.position) == (buckets[8], 0)
    assert "rows of one length" in caplog.text
