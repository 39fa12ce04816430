"""The waiting rows, compared with a simple model: one flat list that is always sorted."""

from __future__ import annotations

import gc
import weakref

from hypothesis import given
from hypothesis import strategies as st

from evalmode.service.batching.ticket import Entry, Part
from evalmode.service.batching.waiting_rows import WaitingRows

BUCKETS = ("short", "long", "other")
ADD = st.tuples(
    st.just("add"),
    st.sampled_from(BUCKETS),
    st.floats(0, 9) | st.integers(0, 3).map(float),  # many have the same urgency
    st.lists(st.integers(0, 99), min_size=1, max_size=5),
)
TAKE = st.tuples(st.just("take"), st.sampled_from([*BUCKETS, None]), st.integers(1, 6))
REMOVE = st.tuples(st.just("remove"), st.integers(0, 30))


class SortedList:
    """All rows as (order, position, bucket, part, bytes)."""

    def __init__(self) -> None:
        self.rows: list[tuple[tuple[float, int], int, str, Part, int]] = []

    def add(self, part: Part) -> None:
        self.rows += [
            (part.order, entry.position, part.bucket, part, entry.nbytes) for entry in part.rows
        ]
        self.rows.sort(key=lambda row: row[:2])

    def head(self, bucket: str | None) -> Part | None:
        return next((row[3] for row in self.rows if bucket in (None, row[2])), None)

    def take(self, part: Part, count: int) -> list[int]:
        first = [row for row in self.rows if row[3] is part][:count]
        self.rows = [row for row in self.rows if row not in first]
        return [row[1] for row in first]

    def remove(self, part: Part) -> None:
        self.rows = [row for row in self.rows if row[3] is not part]


@given(st.lists(ADD | TAKE | REMOVE, max_size=60))
def test_it_behaves_like_a_sorted_list_of_all_rows(steps):
    waiting = WaitingRows()
    model = SortedList()
    parts: list[Part] = []
    for number, step in enumerate(steps):
        if step[0] == "add":
            _, bucket, urgency, sizes = step
            items = [
                Entry(None, index, f"{number}.{index}", size) for index, size in enumerate(sizes)
            ]
            part = Part(bucket, items, order=(urgency, number), ticket=None)
            parts.append(part)
            model.add(part)
            waiting.add(part)
        elif step[0] == "take":
            head = waiting.head() if step[1] is None else waiting.head_of(step[1])
            assert head is model.head(step[1])
            if head is not None:
                rows = waiting.take(head, step[2])
                assert [row.position for row in rows] == model.take(head, step[2])
                assert all(row.row.endswith(f".{row.position}") for row in rows)
        elif parts:
            part = parts[step[1] % len(parts)]  # also one that has left already
            model.remove(part)
            waiting.remove(part)
        assert waiting.rows == len(model.rows)
        assert waiting.nbytes == sum(row[4] for row in model.rows)
        assert set(waiting) == {row[2] for row in model.rows}
        assert all(
            waiting.rows_of(bucket) == sum(row[2] == bucket for row in model.rows)
            for bucket in BUCKETS
        )


def test_a_removed_row_is_freed():
    class Row:
        pass

    row = Row()
    reference = weakref.ref(row)
    part = Part("short", [Entry(None, 0, row, 8)], order=(1.0, 1), ticket=None)
    del row
    waiting = WaitingRows()
    waiting.add(part)
    waiting.remove(part)
    gc.disable()  # reference counts alone must free it
    try:
        assert reference() is None
    finally:
        gc.enable()


def test_a_bucket_without_rows_is_freed():
    class Bucket:
        pass

    bucket = Bucket()
    reference = weakref.ref(bucket)
    waiting = WaitingRows()
    waiting.add(
        Part(
            bucket,
            [Entry(None, 0, "row", 8), Entry(None, 1, "row", 8)],
            order=(1.0, 1),
            ticket=None,
        )
    )
    head = waiting.head()
    assert head is not None
    waiting.take(head, 1)
    assert list(waiting) == [bucket]
    waiting.take(head, 1)
    assert list(waiting) == []
    assert waiting.head() is None
    del head, bucket
    assert reference() is None
