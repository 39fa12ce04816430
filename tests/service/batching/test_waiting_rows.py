"""The waiting rows against a model that keeps one flat list and sorts it whenever it is asked."""

from __future__ import annotations

import gc
import weakref

from hypothesis import given
from hypothesis import strategies as st

from evalmode.service.batching.ticket import Part
from evalmode.service.batching.waiting_rows import WaitingRows

BUCKETS = ("short", "long", "other")
ADD = st.tuples(
    st.just("add"),
    st.sampled_from(BUCKETS),
    st.floats(0, 9) | st.integers(0, 3).map(float),  # many of one urgency
    st.lists(st.integers(0, 99), min_size=1, max_size=5),
)
TAKE = st.tuples(st.just("take"), st.sampled_from([*BUCKETS, None]), st.integers(1, 6))
REMOVE = st.tuples(st.just("remove"), st.integers(0, 30))


class Naive:
    def __init__(self) -> None:
        self.rows: list[
            tuple[tuple[float, int], int, str, Part, int]
        ] = []  # order, place, bucket, part, nbytes

    def add(self, part: Part) -> None:
        self.rows += [
            (part.order, place, part.bucket, part, nbytes) for place, _, nbytes in part.rows
        ]
        self.rows.sort(key=lambda row: row[:2])

    def head(self, bucket: str | None) -> Part | None:
        return next((row[3] for row in self.rows if bucket in (None, row[2])), None)

    def take(self, part: Part, count: int) -> list[int]:
        taken = [row for row in self.rows if row[3] is part][:count]
        self.rows = [row for row in self.rows if row not in taken]
        return [row[1] for row in taken]

    def remove(self, part: Part) -> None:
        self.rows = [row for row in self.rows if row[3] is not part]


@given(st.lists(ADD | TAKE | REMOVE, max_size=60))
def test_it_does_what_a_sorted_list_of_all_rows_does(steps):
    waiting = WaitingRows()
    naive = Naive()
    parts: list[Part] = []
    for number, step in enumerate(steps):
        if step[0] == "add":
            _, bucket, urgency, sizes = step
            items = [(place, f"{number}.{place}", size) for place, size in enumerate(sizes)]
            part = Part(bucket, items, order=(urgency, number), ticket=None)
            parts.append(part)
            naive.add(part)
            waiting.add(part)
        elif step[0] == "take":
            head = waiting.head(step[1])
            assert head is naive.head(step[1])
            if head is not None:
                taken = waiting.take(head, step[2])
                assert [place for place, _ in taken] == naive.take(head, step[2])
                assert all(item.endswith(f".{place}") for place, item in taken)
        elif parts:
            part = parts[step[1] % len(parts)]  # also one that has left already
            naive.remove(part)
            waiting.remove(part)
        assert waiting.rows == len(naive.rows)
        assert waiting.nbytes == sum(row[4] for row in naive.rows)
        assert set(waiting) == {row[2] for row in naive.rows}
        assert all(
            waiting.rows_of(bucket) == sum(row[2] == bucket for row in naive.rows)
            for bucket in BUCKETS
        )


def test_what_was_removed_is_not_kept_anywhere():
    class Row:
        pass

    row = Row()
    gone = weakref.ref(row)
    part = Part("short", [(0, row, 8)], order=(1.0, 1), ticket=None)
    del row
    waiting = WaitingRows()
    waiting.add(part)
    waiting.remove(part)
    gc.disable()  # nothing may be left to it
    try:
        assert gone() is None
    finally:
        gc.enable()


def test_a_bucket_without_rows_is_forgotten():
    class Bucket:
        pass

    bucket = Bucket()
    gone = weakref.ref(bucket)
    waiting = WaitingRows()
    waiting.add(Part(bucket, [(0, "row", 8), (1, "row", 8)], order=(1.0, 1), ticket=None))
    head = waiting.head()
    assert head is not None
    waiting.take(head, 1)
    assert list(waiting) == [bucket]
    waiting.take(head, 1)
    assert list(waiting) == []
    assert waiting.head() is None
    del head, bucket
    assert gone() is None
