"""The rows that wait, most urgent first: a pure data structure, without threads and without a
clock.

Rows of one request in one bucket wait together, as a `Part`: they have one urgency, so that what is
sorted and removed is a request's part and not each of its rows. What leaves, leaves at once and
wholly; nothing is marked and kept.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Owner = TypeVar("Owner")


class Part(Generic[Key, Item, Owner]):
    """Rows of one owner in one bucket, with their places in the owner's request and their bytes.

    `order` is (urgency, sequence): the lowest goes first. No two parts of one bucket have the same.
    """

    __slots__ = ("bucket", "items", "nbytes", "order", "owner", "size")

    def __init__(
        self,
        bucket: Key,
        items: Iterable[tuple[int, Item, int]],
        *,
        order: tuple[float, int],
        owner: Owner,
    ):
        self.bucket = bucket
        self.items = deque(items)
        self.size = len(self.items)
        self.nbytes = sum(nbytes for _, _, nbytes in self.items)
        self.order = order
        self.owner = owner


class _Line(Generic[Key, Item, Owner]):
    """The parts of one bucket, sorted, and the rows in them."""

    __slots__ = ("parts", "rows")

    def __init__(self) -> None:
        self.parts: list[Part[Key, Item, Owner]] = []
        self.rows = 0


class Waiting(Generic[Key, Item, Owner]):
    """All that waits, in `rows` and `nbytes`, and by bucket."""

    def __init__(self) -> None:
        self.rows = 0
        self.nbytes = 0
        self._lines: dict[Key, _Line[Key, Item, Owner]] = {}

    def add(self, part: Part[Key, Item, Owner]) -> None:
        """Let the rows of a part wait; it has at least one."""
        assert part.items, "a part that waits has rows"
        line = self._lines.get(part.bucket)
        if line is None:
            line = self._lines[part.bucket] = _Line()
        insort(line.parts, part, key=_order)
        self._count(line, rows=len(part.items), nbytes=part.nbytes)

    def take(self, part: Part[Key, Item, Owner], count: int) -> list[tuple[int, Item]]:
        """Let the first `count` rows of a part, or all if there are fewer, wait no more; each with
        its place.
        """
        if count >= len(part.items):
            taken = [(place, item) for place, item, _ in part.items]
            self.remove(part)
            return taken
        taken, nbytes = [], 0
        for _ in range(count):
            place, item, size = part.items.popleft()
            taken.append((place, item))
            nbytes += size
        part.nbytes -= nbytes
        self._count(self._lines[part.bucket], rows=-count, nbytes=-nbytes)
        return taken

    def remove(self, part: Part[Key, Item, Owner]) -> None:
        """Let a part wait no more; one that does not wait (any more) is left alone."""
        line = self._lines.get(part.bucket)
        if line is None:
            return
        at = bisect_left(line.parts, part.order, key=_order)
        if at == len(line.parts) or line.parts[at] is not part:
            return
        del line.parts[at]
        self._count(line, rows=-len(part.items), nbytes=-part.nbytes)
        part.items.clear()
        part.nbytes = 0
        if not line.parts:
            del self._lines[part.bucket]  # a bucket of a model that is gone must not be kept

    def head(self, bucket: Key | None = None) -> Part[Key, Item, Owner] | None:
        """The most urgent part, of `bucket` or of all."""
        if bucket is not None:
            line = self._lines.get(bucket)
            return line.parts[0] if line is not None else None
        return min((line.parts[0] for line in self._lines.values()), key=_order, default=None)

    def rows_of(self, bucket: Key) -> int:
        """The rows that wait in a bucket."""
        line = self._lines.get(bucket)
        return line.rows if line is not None else 0

    def __iter__(self) -> Iterator[Key]:
        """The buckets in which rows wait."""
        return iter(self._lines)

    def _count(self, line: _Line[Key, Item, Owner], *, rows: int, nbytes: int) -> None:
        line.rows += rows
        self.rows += rows
        self.nbytes += nbytes


def _order(part: Part[Key, Item, Owner]) -> tuple[float, int]:
    return part.order
