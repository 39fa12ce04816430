"""The engine under many callers at once: every answer is right, every batch allowed, nothing lost
and nothing kept.
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
    Held,
    Notes,
    Number,
    bucket_of,
    engine_of,
    in_thread,
    jobs_of,
)

LABELS = ("short", "long", "other")
POISON = 13
SPOILT = 17  # an exception in its place, not of its batch


class Checked:
    """A run that finds its rows to be of its own bucket and of an allowed number, and gives way in
    between.
    """

    def __init__(self, number: int, counts: Sequence[int]) -> None:
        self.faults: list[str] = []
        self._number = number
        self._counts = counts

    def __call__(self, rows: Sequence[Number]) -> list[int | Exception]:
        if len(rows) not in self._counts:
            self.faults.append(f"a batch of {len(rows)}, allowed is {self._counts}")
        # rows carry their bucket's number as their bytes
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
    (found,) = await asyncio.gather(task, return_exceptions=True)
    return found


@settings(max_examples=120, deadline=None)
@given(
    st.lists(REQUEST, min_size=1, max_size=25), st.tuples(COUNTS, COUNTS, COUNTS), st.integers(1, 3)
)
def test_any_mix_of_requests_is_answered_right_or_fails_for_a_reason_of_its_own(
    requests, counts, parallel
):
    runs = [Checked(number, allowed) for number, allowed in enumerate(counts)]
    buckets = [
        bucket_of(run, label=label, costs={count: 1.0 + count / 8 for count in allowed})
        for run, label, allowed in zip(runs, LABELS, counts, strict=True)
    ]
    notes = Notes()

    async def ask(engine) -> list[object]:
        asked = [
            outcome(
                engine,
                [(buckets[number], Number(value, nbytes=number)) for number, value in rows],
                fate,
            )
            for rows, fate in requests
        ]
        return await asyncio.gather(*asked)

    with engine_of(parallel=parallel, observers=[notes], proof_fraction=0.3) as engine:
        found = asyncio.run(ask(engine))
        load = engine.load
        assert (load.waiting_rows, load.waiting_bytes) == (0, 0)
    assert [run.faults for run in runs] == [[], [], []]
    assert not any(notes.proofs)
    for (rows, fate), answers in zip(requests, found, strict=True):
        guilty = any(value in (POISON, SPOILT) for _, value in rows)
        if isinstance(answers, list):
            assert answers == [value * 10 + number for number, value in rows]
            assert not guilty
        else:
            allowed = {
                "stay": (),
                "cancel": (asyncio.CancelledError,),
                "deadline": (DeadlineExceeded,),
            }[fate]
            assert isinstance(answers, (*allowed, RunFailed))
            assert guilty or not isinstance(answers, RunFailed)
    lost = Counter(
        type(answers) for (rows, _), answers in zip(requests, found, strict=True) for _ in rows
    )
    told = sum(rows for _, _, rows in notes.dropped)
    at_least = lost[DeadlineExceeded] + lost[RunFailed]
    # some are cancelled when their answer is there
    assert at_least <= told <= at_least + lost[asyncio.CancelledError]


def mixed_buckets() -> list[Bucket]:
    costs = {1: 1.0, 2: 1.1, 4: 1.3, 8: 2.0}
    return [
        bucket_of(
            lambda rows, add=add: [row.value * 10 + add for row in rows], label=label, costs=costs
        )
        for add, label in enumerate(LABELS)
    ]


def test_callers_that_block_and_callers_that_await_each_get_their_own_answers():
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
            found = engine.answer(jobs, timeout_s=WAIT_S)
            if found != expected:
                wrong.append((found, expected))

    async def wait(engine, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(50):
            jobs, expected = request(chance)
            found = await engine.answer_async(jobs, timeout_s=WAIT_S)
            if found != expected:
                wrong.append((found, expected))

    async def many(engine) -> None:
        await asyncio.gather(*(wait(engine, seed) for seed in range(40)))

    with engine_of(parallel=3) as engine:
        threads = [in_thread(lambda seed=seed: block(engine, seed)) for seed in range(100, 106)]
        threads += [in_thread(lambda: asyncio.run(many(engine))) for _ in range(2)]
        for thread in threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
    assert wrong == []


def test_closing_under_load_answers_all_that_was_accepted_and_nothing_else():
    buckets = mixed_buckets()
    ended: Counter[str] = Counter()
    under_way = threading.Event()

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
                under_way.set()

    with engine_of(parallel=2) as engine:
        threads = [in_thread(lambda seed=seed: ask(engine, seed)) for seed in range(8)]
        assert under_way.wait(WAIT_S)
        assert engine.close(timeout_s=WAIT_S)
        for thread in threads:
            thread.join(WAIT_S)
    # all others got theirs: no other error, and no caller left waiting
    assert ended["refused"] == 8


def test_a_wedged_run_and_100_000_cancelled_requests_leave_nothing_behind():
    held = Held()
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

    async def blocks_kept(engine) -> int:
        await cancelled(engine, 5_000)
        gc.collect()
        before = sys.getallocatedblocks()
        await cancelled(engine, 95_000)
        gc.collect()
        return sys.getallocatedblocks() - before

    with engine_of() as engine:
        asked = in_thread(lambda: engine.answer(jobs_of(bucket_of(held), [0])))
        assert held.begun.wait(WAIT_S)
        # of Python's memory blocks: one a request would be 95,000
        assert asyncio.run(blocks_kept(engine)) < 5_000
        held.release.set()
        asked.join(WAIT_S)


def test_cancelling_and_answering_at_the_same_moment_loses_no_wake_up():
    """Single-row requests from one event loop, half of them cancelled while threads take and answer
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
                found = await asyncio.gather(*tasks, return_exceptions=True)
            for value, answers in enumerate(found):
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
            except QueueFull:  # somebody came in between: wait again
                continue
            assert answers == [each * 10 for each in range(value, value + 10)]
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
