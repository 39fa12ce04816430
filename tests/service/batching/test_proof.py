"""The online proof: it reports answers that differ, says how to reproduce them, and is bounded."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Sequence

import pytest

from evalmode.service.batching.limits import Limits
from evalmode.service.batching.proof import Proofs
from tests.service.batching.engine_fakes import (
    WAIT_S,
    Number,
    RecordingObserver,
    RecordingRun,
    bucket_of,
    engine_of,
    in_thread,
    jobs_of,
)


def digest(value: int) -> str:
    return hashlib.sha256(str(value).encode()).hexdigest()


def sha256(answer: object) -> str:
    return hashlib.sha256(repr(answer).encode()).hexdigest()


def proofs_of(fraction: float = 1.0, **arguments) -> Proofs:
    return Proofs(
        fraction=fraction,
        content=lambda answer: repr(answer).encode(),
        **arguments,
    )


def wrong_second_row(rows: Sequence[Number]) -> list[float]:
    """The fault that the proof is for: the second row of a batch has another answer than alone."""
    answers: list[float] = [row.value * 10 for row in rows]
    if len(rows) > 1 and rows[1].value != rows[0].value:
        answers[1] += 0.5
    return answers


def test_a_row_with_other_bits_in_a_batch_is_reported_with_all_that_reproduces_it():
    observer = RecordingObserver()
    bucket = bucket_of(wrong_second_row, costs={4: 1.0})
    with engine_of(proof_fraction=1.0, observers=[observer]) as engine:
        assert engine.answer(jobs_of(bucket, [5, 6, 7])) == [50, 60.5, 70]
        until(lambda: len(observer.proofs) == 3, observer)
    (violation,) = [proof for proof in observer.proofs if proof is not None]
    assert violation.bucket is bucket
    assert violation.row_digest == digest(6)
    assert violation.batch_digests == (digest(5), digest(6), digest(7))
    assert (violation.position, violation.batch_size) == (1, 4)
    assert violation.expected_sha256 == sha256(60)
    assert violation.actual_sha256 == sha256(60.5)


def test_after_a_violation_a_bucket_runs_only_at_measured_sizes(caplog):
    observer = RecordingObserver()
    measured = {1: 1.0, 4: 2.0}
    bucket = bucket_of(wrong_second_row, costs={1: 1.0, 2: 1.3, 3: 1.6, 4: 2.0})
    bucket.measured_costs = measured
    with engine_of(proof_fraction=1.0, observers=[observer]) as engine:
        assert engine.answer(jobs_of(bucket, [5, 6, 7])) == [50, 60.5, 70]
        until(lambda: len(observer.proofs) == 3, observer)
    assert bucket.costs == measured
    (record,) = [record for record in caplog.records if "does not hold here" in record.message]
    assert record.levelname == "ERROR"
    # It is reported once.
    assert not bucket.fall_back()


def until(condition, observer: RecordingObserver) -> None:
    while not condition():
        assert observer.proved_once.wait(WAIT_S)
        observer.proved_once.clear()


def test_a_run_without_batch_effects_has_no_violation():
    observer = RecordingObserver()
    with engine_of(proof_fraction=1.0, observers=[observer]) as engine:
        engine.answer(jobs_of(bucket_of(), [5, 6, 7]))
        until(lambda: len(observer.proofs) == 3, observer)
    assert observer.proofs == [None, None, None]


def test_the_row_is_run_again_alone_at_the_smallest_batch_size():
    observer = RecordingObserver()
    run = RecordingRun()
    with engine_of(proof_fraction=1.0, observers=[observer]) as engine:
        engine.answer(jobs_of(bucket_of(run, costs={2: 1.0, 4: 1.0}), [5, 6, 7, 8]))
        until(lambda: len(observer.proofs) == 4, observer)
    assert run.batches == [[5, 6, 7, 8], [5, 5], [6, 6], [7, 7], [8, 8]]


def test_waiting_rows_run_before_proofs():
    order: list[str] = []
    begun, release = threading.Event(), threading.Event()

    def first(rows: Sequence[Number]) -> list[int]:
        if not begun.is_set():
            begun.set()
            assert release.wait(WAIT_S)
            order.append("blocked")
        else:
            order.append("proof")
        return [0] * len(rows)

    def second(rows: Sequence[Number]) -> list[int]:
        order.append("real")
        return [0] * len(rows)

    observer = RecordingObserver()
    slow, quick = bucket_of(first, label="slow"), bucket_of(second, label="quick", costs={1: 1.0})
    with engine_of(proof_fraction=1.0, observers=[observer]) as engine:
        caller = in_thread(lambda: engine.answer([(slow, Number(1))]))
        assert begun.wait(WAIT_S)

        async def send_five() -> None:
            tasks = [
                asyncio.create_task(engine.answer_async([(quick, Number(n))])) for n in range(5)
            ]
            await asyncio.sleep(0)  # all five wait in the queue now
            release.set()
            await asyncio.gather(*tasks)

        asyncio.run(send_five())
        until(lambda: len(observer.proofs) == 6, observer)
        caller.join(WAIT_S)
    assert order[:6] == ["blocked"] + ["real"] * 5
    assert order[6] == "proof"


def test_one_thread_proves_at_a_time_so_that_the_others_stay_free():
    proofs, begun, release = [], threading.Event(), threading.Event()

    def run(rows: Sequence[Number]) -> list[int]:
        if len(rows) == 1:  # the batches below have two
            proofs.append(rows[0].value)
            begun.set()
            assert release.wait(WAIT_S)
        return [0] * len(rows)

    bucket, pairs = bucket_of(run, costs={1: 9.0, 2: 1.0}), bucket_of(label="pairs", costs={2: 1.0})
    with engine_of(parallel=2, proof_fraction=1.0) as engine:
        engine.answer(jobs_of(bucket, [1, 2, 3, 4]))
        assert begun.wait(WAIT_S)
        assert engine.load.running_batches == 0
        # The other thread answers. Four samples wait each time it has no other work.
        for _ in range(20):
            assert engine.answer(jobs_of(pairs, [4, 5])) == [40, 50]
        assert len(proofs) == 1
        release.set()


def test_a_proof_that_hangs_counts_as_a_stuck_run():
    now = [0.0]
    begun, release = threading.Event(), threading.Event()

    def run(rows: Sequence[Number]) -> list[int]:
        if begun.is_set() or not ran:
            ran.append(1)
            return [0] * len(rows)
        begun.set()
        assert release.wait(WAIT_S)
        return [0] * len(rows)

    ran: list[int] = []
    with engine_of(
        proof_fraction=1.0, clock=lambda: now[0], limits=Limits(max_run_s=30.0)
    ) as engine:
        engine.answer(jobs_of(bucket_of(run), [1]))
        assert begun.wait(WAIT_S)
        now[0] = 42.0
        assert engine.stuck_s() == 12.0
        release.set()


def test_a_proof_that_raises_reports_nothing_and_the_engine_goes_on():
    def run(rows: Sequence[Number]) -> list[int]:
        calls.append(len(rows))
        if len(calls) == 2:
            failed.set()
            raise ArithmeticError("the model is gone")
        return [0] * len(rows)

    calls: list[int] = []
    failed = threading.Event()
    observer = RecordingObserver()
    with engine_of(proof_fraction=1.0, observers=[observer]) as engine:
        engine.answer(jobs_of(bucket_of(run), [1]))
        assert failed.wait(WAIT_S)
        engine.answer(jobs_of(bucket_of(run), [2]))
        until(lambda: len(observer.proofs) == 1, observer)
    assert observer.proofs == [None]


def test_an_error_while_sampling_costs_no_answer():
    def refuse(answer: object) -> bytes:
        raise TypeError("no bytes")

    with engine_of(proof_fraction=1.0, content=refuse) as engine:
        assert engine.answer(jobs_of(bucket_of(), [1, 2])) == [10, 20]


def test_the_answer_is_compared_as_delivered_even_if_the_caller_changes_it():
    def run(rows: Sequence[Number]) -> list[list[int]]:
        return [[row.value] for row in rows]

    proofs = proofs_of()
    bucket = bucket_of(run)
    answers = run([Number(1)])
    proofs.sample(bucket, [Number(1)], answers, batch_size=1)
    answers[0].append(2)
    sample = proofs.take()
    assert sample is not None
    assert proofs.prove(sample) is None


def test_samples_are_bounded_in_number_and_in_bytes():
    proofs = proofs_of()
    bucket = bucket_of()
    for _ in range(10):
        proofs.sample(bucket, [Number(1)] * 32, [10] * 32, batch_size=32)
    assert len(proofs) == 64
    proofs.clear()
    for _ in range(10):
        proofs.sample(bucket, [Number(1, nbytes=20 << 20)], [10], batch_size=1)
    assert len(proofs) == 3
    proofs.clear()
    proofs.sample(bucket, [Number(1, nbytes=100 << 20)] * 2, [10] * 2, batch_size=2)
    assert len(proofs) == 1  # a batch beyond the limit is proved too, one at a time


def test_answers_are_sampled_with_the_given_probability_and_failures_never():
    draws = iter([0.0, 0.001, 0.0009, 0.5])
    proofs = proofs_of(0.001, draw=lambda: next(draws))
    proofs.sample(
        bucket_of(), [Number(n) for n in range(4)], [ValueError(), 10, 20, 30], batch_size=4
    )
    sample = proofs.take()
    assert sample is not None
    assert sample.position == 2
    assert proofs.take() is None


def test_a_fraction_above_1_is_refused_by_name():
    with pytest.raises(ValueError, match=r"proof_fraction is 1\.5"):
        proofs_of(1.5)
