"""The limits of the engine, and the estimate of how fast its queue empties."""

from __future__ import annotations

import pytest

from evalmode.service.batching.limits import DrainRate, Limits


@pytest.mark.parametrize("name", ["queue_rows", "queue_bytes", "max_run_s", "patience_s"])
def test_a_limit_that_is_not_above_zero_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        Limits(**{name: 0})


def test_before_the_first_batch_the_estimate_is_the_assumed_cost():
    assert DrainRate(parallel=2).retry_after_s(100, assumed_row_s=0.1) == 5


def test_after_a_batch_the_estimate_is_the_measured_rate_of_all_threads():
    drain = DrainRate(parallel=2)
    drain.record(rows=4, run_s=1.0)
    assert drain.retry_after_s(80, assumed_row_s=99.0) == 10
    assert drain.wait_s(2, assumed_row_s=99.0) == 0.25


def test_a_batch_counts_by_its_rows():
    drain = DrainRate(parallel=1)
    drain.record(rows=1, run_s=1.0)
    drain.record(rows=31, run_s=1.0)
    assert drain.wait_s(1, assumed_row_s=0.0) == pytest.approx(1.9 / 31.9)


def test_the_estimate_follows_a_machine_that_gets_slower_but_not_a_single_batch():
    drain = DrainRate(parallel=1)
    for _ in range(50):
        drain.record(rows=1, run_s=0.1)
    drain.record(rows=1, run_s=1.0)
    assert drain.retry_after_s(10, assumed_row_s=0.0) == 2
    for _ in range(50):
        drain.record(rows=1, run_s=1.0)
    assert drain.retry_after_s(10, assumed_row_s=0.0) == 10


def test_the_retry_time_is_from_1_to_60_seconds():
    drain = DrainRate(parallel=1)
    assert drain.retry_after_s(0, assumed_row_s=0.0) == 1
    drain.record(rows=1, run_s=5.0)
    assert drain.retry_after_s(4096, assumed_row_s=0.0) == 60


def test_of_batches_without_waiting_rows_only_the_faster_ones_count():
    drain = DrainRate(parallel=1)
    drain.record(rows=1, run_s=9.0, under_load=False)
    assert drain.wait_s(10, assumed_row_s=0.5) == 5.0, "no batch has been measured yet"
    drain.record(rows=10, run_s=1.0)
    drain.record(rows=1, run_s=1.0, under_load=False)
    assert drain.wait_s(10, assumed_row_s=0.0) == pytest.approx(1.0)
    drain.record(rows=1, run_s=0.01, under_load=False)
    assert drain.wait_s(10, assumed_row_s=0.0) == pytest.approx(10 * 0.91 / 10.0)
