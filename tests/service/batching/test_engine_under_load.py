"""The engine under many callers at once: all answers are correct, all batches are allowed, and no
request is lost or kept in memory.
"""

from __future__ import annotations

import asyncio
import gc
import random
import sys
import threading
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalmode.service.batching.bucket import Bucket
from evalmode.service.batching.limits import Limits
from evalmode.service.errors import DeadlineExceeded, NotReady, QueueFull, RunFailed
from tests.service.batching.engine_fakes import (
    WAIT_S,
    BlockedRun,
    Number,
    RecordingObserver,
    bucket_of,
    engine_of,
    in_thread,
    jobs_of,
)

LABELS = ("short", "long", "other")
POISON = 13
SPOILT = 17  # gets an exception instead of an answer; its batch does not fail


class CheckingRun:
    """A run that checks that its rows are of its own bucket, and that their number is allowed."""

    def __init__(self, number: int, counts: Sequence[int]) -> None:
        self.faults: list[str] = []
        self._number = number
        self._counts = counts

    def __call__(self, rows: Sequence[Number]) -> list[int | Exception]:
        if len(rows) not in self._counts:
            self.faults.append(f"a batch of {len(rows)}, allowed are {self._counts}")
        # The bytes of a row are the number of its bucket.
        if any(row.nbytes != self._number for row in rows):
            self.faults.append("a row of another bucket")
        if any(row.value == POISON for row in rows):
            raise ArithmeticError("poison")
        return [
            ValueError("spoilt") if row.value == SPOILT else row.value * 10 + self._number
            for row in rows
        ]


COUNTS = st.sets(st.sampled_from([1, 2, 3, 4, 8, 16]), min_size=1).map(sorted)
ROW = st.tuples(st.integers(0, 2), st.integers(0, 20) | st.sampled_from([POISON, SPOILT]))
REQUEST = st.tuples(
    st.lists(ROW, min_size=1, max_size=12),
    st.sampled_from(["stay", "stay", "stay", "cancel", "deadline"]),
)


async def outcome(engine, jobs, fate: str) -> object:
    task = asyncio.create_task(
        engine.answer_async(jobs, timeout_s=1e-4 if fate == "deadline" else WAIT_S)
    )
    if fate == "cancel":
        await asyncio.sleep(0)
        task.cancel()
    (result,) = await asyncio.gather(task, return_exceptions=True)
    return result


@settings(max_examples=120, deadline=None)
@given(
    st.lists(REQUEST, min_size=1, max_size=25), st.tuples(COUNTS, COUNTS, COUNTS), st.integers(1, 3)
)
def test_any_mix_of_requests_is_answered_correctly_or_fails_for_the_requests_own_reason(
    requests, counts, parallel
):
    runs = [CheckingRun(number, allowed) for number, allowed in enumerate(counts)]
    buckets = [
        bucket_of(run, label=label, costs={count: 1.0 + count / 8 for count in allowed})
        for run, label, allowed in zip(runs, LABELS, counts, strict=True)
    ]
    observer = RecordingObserver()

    async def ask(engine) -> list[object]:
        outcomes = [
            outcome(
                engine,
                [(buckets[number], Number(value, nbytes=number)) for number, value in rows],
                fate,
            )
            for rows, fate in requests
        ]
        return await asyncio.gather(*outcomes)

    with engine_of(parallel=parallel, observers=[observer], proof_fraction=0.3) as engine:
        outcomes = asyncio.run(ask(engine))
        load = engine.load
        assert (load.waiting_rows, load.waiting_bytes) == (0, 0)
    assert [run.faults for run in runs] == [[], [], []]
    assert not any(observer.proofs)
    for (rows, fate), answers in zip(requests, outcomes, strict=True):
        is_at_fault = any(value in (POISON, SPOILT) for _, value in rows)
        if isinstance(answers, list):
            assert answers == [value * 10 + number for number, value in rows]
            assert not is_at_fault
        else:
            allowed = {
                "stay": (),
                "cancel": (asyncio.CancelledError,),
                "deadline": (DeadlineExceeded,),
            }[fate]
            assert isinstance(answers, (*allowed, RunFailed))
            assert is_at_fault or not isinstance(answers, RunFailed)
    rows_by_outcome = Counter(
        type(answers) for (rows, _), answers in zip(requests, outcomes, strict=True) for _ in rows
    )
    dropped = sum(rows for _, _, rows in observer.dropped)
    failed = rows_by_outcome[DeadlineExceeded] + rows_by_outcome[RunFailed]
    # Some requests are cancelled when they are already answered.
    assert failed <= dropped <= failed + rows_by_outcome[asyncio.CancelledError]


def mixed_buckets() -> list[Bucket]:
    costs = {1: 1.0, 2: 1.1, 4: 1.3, 8: 2.0}
    return [
        bucket_of(
            lambda rows, add=add: [row.value * 10 + add for row in rows], label=label, costs=costs
        )
        for add, label in enumerate(LABELS)
    ]


def test_blocking_and_awaiting_callers_get_their_own_answers():
    buckets = mixed_buckets()
    wrong: list[object] = []

    def request(chance: random.Random) -> tuple[list, list[int]]:
        picks = [
            (chance.randrange(3), chance.randrange(10_000)) for _ in range(chance.randint(1, 20))
        ]
        return [(buckets[b], Number(value)) for b, value in picks], [
            value * 10 + b for b, value in picks
        ]

    def block(engine, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(150):
            jobs, expected = request(chance)
            answers = engine.answer(jobs, timeout_s=WAIT_S)
            if answers != expected:
                wrong.append((answers, expected))

    async def wait(engine, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(50):
            jobs, expected = request(chance)
            answers = await engine.answer_async(jobs, timeout_s=WAIT_S)
            if answers != expected:
                wrong.append((answers, expected))

    async def many(engine) -> None:
        await asyncio.gather(*(wait(engine, seed) for seed in range(40)))

    with engine_of(parallel=3) as engine:
        threads = [in_thread(lambda seed=seed: block(engine, seed)) for seed in range(100, 106)]
        threads += [in_thread(lambda: asyncio.run(many(engine))) for _ in range(2)]
        for thread in threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
    assert wrong == []


def test_closing_under_load_answers_all_admitted_requests_and_no_others():
    buckets = mixed_buckets()
    ended: Counter[str] = Counter()
    is_busy = threading.Event()

    def ask(engine, seed: int) -> None:
        for value in range(1_000_000):
            try:
                assert engine.answer(jobs_of(buckets[0], [value, seed]), timeout_s=WAIT_S) == [
                    value * 10,
                    seed * 10,
                ]
            except NotReady:
                ended["refused"] += 1
                return
            ended["answered"] += 1
            if ended["answered"] > 200:
                is_busy.set()

    with engine_of(parallel=2) as engine:
        threads = [in_thread(lambda seed=seed: ask(engine, seed)) for seed in range(8)]
        assert is_busy.wait(WAIT_S)
        assert engine.close(timeout_s=WAIT_S)
        for thread in threads:
            thread.join(WAIT_S)
    # All threads ended here: no caller got another error, and none still waits.
    assert ended["refused"] == 8


def test_cancelled_requests_behind_a_stuck_run_use_no_memory_afterwards():
    blocked = BlockedRun()
    bucket = bucket_of()

    async def cancelled(engine, count: int) -> None:
        for _ in range(count // 100):
            tasks = [
                asyncio.create_task(engine.answer_async(jobs_of(bucket, [1]), timeout_s=WAIT_S))
                for _ in range(100)
            ]
            await asyncio.sleep(0)
            assert engine.load.waiting_rows == 100
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            assert engine.load.waiting_rows == 0

    async def leaked_blocks(engine) -> int:
        await cancelled(engine, 5_000)
        gc.collect()
        before = sys.getallocatedblocks()
        await cancelled(engine, 95_000)
        gc.collect()
        return sys.getallocatedblocks() - before

    with engine_of() as engine:
        caller = in_thread(lambda: engine.answer(jobs_of(bucket_of(blocked), [0])))
        assert blocked.begun.wait(WAIT_S)
        # Blocks of Python's memory: one leaked block for each request would be 95,000.
        assert asyncio.run(leaked_blocks(engine)) < 5_000
        blocked.release.set()
        caller.join(WAIT_S)


def test_cancelling_and_answering_at_the_same_moment_loses_no_wake_up():
    """Requests of one row from one event loop. Half of them are cancelled while threads answer
    them.
    """
    bucket = mixed_buckets()[0]

    async def ask(engine) -> None:
        chance = random.Random(4)
        for _ in range(200):
            tasks = [
                asyncio.create_task(engine.answer_async(jobs_of(bucket, [value])))
                for value in range(20)
            ]
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            leaving = set(chance.sample(range(20), 10))
            for value in leaving:
                tasks[value].cancel()
            async with asyncio.timeout(WAIT_S):
                outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            for value, answers in enumerate(outcomes):
                assert answers == [value * 10] or (
                    value in leaving and isinstance(answers, asyncio.CancelledError)
                )

    with engine_of(parallel=2) as engine:
        asyncio.run(ask(engine))
        assert engine.load.waiting_rows == 0


def test_streams_through_a_small_queue_lose_nothing():
    bucket = mixed_buckets()[0]

    async def stream(engine, seed: int) -> None:
        value = 0
        while value < 300:
            await engine.wait_for_room(10)
            try:
                answers = await engine.answer_async(jobs_of(bucket, range(value, value + 10)))
            except QueueFull:  # another request was faster: wait again
                continue
            assert answers == [number * 10 for number in range(value, value + 10)]
            value += 10

    async def many(engine) -> None:
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*(stream(engine, seed) for seed in range(20)))

    with engine_of(parallel=2, limits=Limits(queue_rows=25)) as engine:
        loops = [in_thread(lambda: asyncio.run(many(engine))) for _ in range(2)]
        for thread in loops:
            thread.join(WAIT_S)
            assert not thread.is_alive()


@pytest.mark.parametrize("rows", [1, 32])
def test_one_request_wakes_its_event_loop_once_however_many_rows_it_has(rows, monkeypatch):
    wakes: list[object] = []

    async def ask(engine) -> None:
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe

        def counted(*args, **kwargs):
            wakes.append(args)
            return call(*args, **kwargs)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        assert (
            len(await engine.answer_async(jobs_of(bucket_of(costs={1: 1.0}), range(rows)))) == rows
        )

    with engine_of(parallel=2) as engine:
        asyncio.run(ask(engine))
    assert len(wakes) == 1
