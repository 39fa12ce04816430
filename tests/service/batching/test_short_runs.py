"""Short runs in the event loop, and all that holds for them as for runs in threads."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from evalmode.service.batching.bucket import Bucket
from evalmode.service.errors import DeadlineExceeded
from tests.service.batching.engine_fakes import (
    WAIT_S,
    BlockedRun,
    Number,
    RecordingObserver,
    RecordingRun,
    engine_of,
    in_thread,
    jobs_of,
    times_ten,
)


@dataclass
class PlacedRun(RecordingRun):
    """Records the thread of each run, which takes `busy_s` of the processor's time."""

    busy_s: float = 0.0
    threads: list[threading.Thread] = field(default_factory=list)

    def __call__(self, rows):
        self.threads.append(threading.current_thread())
        end = time.thread_time() + self.busy_s
        while time.thread_time() < end:
            pass
        return super().__call__(rows)

    def in_loop(self) -> list[bool]:
        return [thread is threading.main_thread() for thread in self.threads]


def bucket_with(run, *, row_s: float, **arguments) -> Bucket:
    """A bucket of batches of 1 to 8 rows, each row of which takes `row_s`."""
    costs = arguments.pop("costs", {size: size * row_s for size in (1, 2, 4, 8)})
    return Bucket(model="m", version="1", label="8", positions=8, run=run, costs=costs, **arguments)


@pytest.mark.parametrize(
    ("row_s", "parallel", "in_loop"),
    [(0.0005, 2, True), (0.004, 2, False), (0.004, 1, True), (0.02, 1, False)],
)
def test_a_run_that_is_short_for_the_number_of_threads_is_in_the_event_loop(
    row_s, parallel, in_loop
):
    run = PlacedRun()
    with engine_of(parallel=parallel) as engine:
        answers = asyncio.run(engine.answer_async(jobs_of(bucket_with(run, row_s=row_s), [1])))
    assert answers == [10]
    assert run.in_loop() == [in_loop]


def test_a_request_of_many_rows_is_no_short_run():
    run = PlacedRun()
    with engine_of() as engine:
        bucket = bucket_with(run, row_s=0.004)
        assert asyncio.run(engine.answer_async(jobs_of(bucket, range(3)))) == [0, 10, 20]
    assert not any(run.in_loop())


def test_a_run_whose_time_depends_on_values_is_for_the_threads():
    run = PlacedRun()
    with engine_of() as engine:
        bucket = bucket_with(run, row_s=0.0001, has_steady_time=False)
        asyncio.run(engine.answer_async(jobs_of(bucket, [1])))
    assert run.in_loop() == [False]


def test_requests_of_one_turn_share_batches_that_are_short():
    run = PlacedRun()

    async def together() -> list[list[int]]:
        bucket = bucket_with(run, row_s=0.004)
        return await asyncio.gather(
            *[engine.answer_async(jobs_of(bucket, [number])) for number in range(5)]
        )

    with engine_of() as engine:
        assert asyncio.run(together()) == [[0], [10], [20], [30], [40]]
    # Two rows take 8 ms, and four would take 16.
    assert run.batches == [[0, 1], [2, 3], [4]]
    assert all(run.in_loop())


def test_the_event_loop_does_other_work_between_two_short_batches():
    order: list[str] = []

    def run(rows):
        order.append("batch")
        return times_ten(rows)

    async def beside() -> None:
        bucket = bucket_with(run, row_s=0.008)
        requests = [
            asyncio.create_task(engine.answer_async(jobs_of(bucket, [number])))
            for number in range(3)
        ]
        while not all(request.done() for request in requests):
            await asyncio.sleep(0)
            order.append("probe")

    with engine_of() as engine:
        asyncio.run(beside())
    batches = [index for index, event in enumerate(order) if event == "batch"]
    assert len(batches) == 3
    assert all("probe" in order[first:last] for first, last in pairwise(batches))


def test_a_request_that_reaches_its_deadline_before_its_turn_never_runs():
    run = PlacedRun()
    times = [0.0]

    async def too_late() -> None:
        bucket = bucket_with(run, row_s=0.0001)
        request = asyncio.create_task(engine.answer_async(jobs_of(bucket, [1]), timeout_s=WAIT_S))
        await asyncio.sleep(0)
        # Its batch is to run in the next turn of the loop, which comes too late.
        times[0] = WAIT_S
        with pytest.raises(DeadlineExceeded):
            await request

    observer = RecordingObserver()
    with engine_of(observers=[observer], clock=lambda: times[0]) as engine:
        asyncio.run(too_late())
        assert engine.load.waiting_rows == 0
    assert run.batches == []
    assert observer.dropped == [("deadline", "8", 1)]


def test_a_request_that_is_cancelled_before_its_turn_never_runs():
    run = PlacedRun()

    async def hang_up() -> None:
        bucket = bucket_with(run, row_s=0.0001)
        gone = asyncio.create_task(engine.answer_async(jobs_of(bucket, [1])))
        stays = asyncio.create_task(engine.answer_async(jobs_of(bucket, [2])))
        asyncio.get_running_loop().call_soon(gone.cancel)
        assert await stays == [20]
        assert gone.cancelled()

    with engine_of() as engine:
        asyncio.run(hang_up())
    assert [2] in run.batches or [1, 2] in run.batches


def test_a_short_run_beyond_max_run_s_is_stuck_until_it_returns():
    run = BlockedRun()
    times = [0.0]

    with engine_of(clock=lambda: times[0]) as engine:
        bucket = bucket_with(run, row_s=0.0001)
        caller = in_thread(lambda: asyncio.run(engine.answer_async(jobs_of(bucket, [1]))))
        assert run.begun.wait(WAIT_S)
        assert engine.load.running_batches == 1
        times[0] = 31.0
        assert engine.stuck_s() == 1.0
        run.release.set()
        caller.join(WAIT_S)
        assert engine.stuck_s() == 0.0


def test_short_runs_are_proved_too():
    observer = RecordingObserver()
    with engine_of(observers=[observer], proof_fraction=1.0) as engine:
        asyncio.run(engine.answer_async(jobs_of(bucket_with(times_ten, row_s=0.0001), [1])))
        assert observer.proved_once.wait(WAIT_S)
    assert observer.proofs == [None]


def test_a_failure_in_a_short_batch_fails_only_the_request_at_fault():
    run = RecordingRun()

    async def together() -> list[object]:
        bucket = bucket_with(run, row_s=0.0001)
        return await asyncio.gather(
            *[engine.answer_async(jobs_of(bucket, [number])) for number in (1, 13, 2)],
            return_exceptions=True,
        )

    with engine_of() as engine:
        first, failure, last = asyncio.run(together())
    assert (first, last) == ([10], [20])
    assert isinstance(failure, Exception)


def test_after_a_run_that_takes_much_longer_than_measured_the_threads_run_its_rows():
    run = PlacedRun(busy_s=0.05)
    with engine_of() as engine:
        bucket = bucket_with(run, row_s=0.0001)
        for number in range(2):
            asyncio.run(engine.answer_async(jobs_of(bucket, [number])))
    assert run.in_loop() == [True, False]
    assert bucket.steady_s == math.inf


def test_a_bucket_that_was_not_measured_runs_in_a_thread_until_its_time_is_known():
    run = PlacedRun()
    with engine_of(clock=lambda: 0.0) as engine:
        bucket = bucket_with(run, row_s=0.0, costs={1: 0.0001}, learns=True)
        for number in range(3):
            asyncio.run(engine.answer_async(jobs_of(bucket, [number])))
    assert run.in_loop() == [False, True, True]


def test_a_bucket_learns_the_smallest_time():
    bucket = bucket_with(times_ten, row_s=0.0, costs={1: 0.0001}, learns=True)
    assert bucket.steady_s == math.inf
    for run_s, learned_s in ((0.5, 0.5), (0.2, 0.2), (0.3, 0.2)):
        bucket.learn(run_s)
        assert bucket.steady_s == bucket.costs[1] == learned_s
    bucket.distrust()
    bucket.learn(0.1)
    assert bucket.steady_s == math.inf


def test_the_jobs_of_another_row_do_not_wait_for_a_thread_that_is_busy():
    blocked = BlockedRun()
    with engine_of() as engine:
        slow = bucket_with(blocked, row_s=1.0)
        caller = in_thread(lambda: engine.answer([(slow, Number(1))]))
        assert blocked.begun.wait(WAIT_S)
        bucket = bucket_with(times_ten, row_s=0.0001)
        assert asyncio.run(engine.answer_async(jobs_of(bucket, [2]), timeout_s=WAIT_S)) == [20]
        blocked.release.set()
        caller.join(WAIT_S)
