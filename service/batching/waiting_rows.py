"""The rows that wait, most urgent first: a pure data structure, without threads or a clock.

The rows of one request in one bucket have one urgency, so they wait together as a `Part`. Parts are
sorted and removed, not single rows. A part is removed at once, never marked and removed later.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator

from evalmode.service.batching.bucket import Bucket
from evalmode.service.batching.ticket import Entry, Part


class _Line:
    """The parts of one bucket, sorted by their order, and the number of their rows."""

    __slots__ = ("parts", "rows")

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.rows = 0


class WaitingRows:
    """All waiting rows by bucket, and their number and bytes: `rows` and `nbytes`.

    Iterating gives the buckets in which rows wait.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.nbytes = 0
        self._lines: dict[Bucket, _Line] = {}

    def add(self, part: Part) -> None:
        """Add a part, which has at least one row."""
        assert part.rows, "a part that waits has rows"
        line = self._lines.get(part.bucket)
        if line is None:
            line = self._lines[part.bucket] = _Line()
        insort(line.parts, part, key=_order)
        self._count(line, rows=len(part.rows), nbytes=part.nbytes)

    def take(self, part: Part, count: int) -> list[Entry]:
        """Remove the first `count` rows of a part, or all if there are fewer, and return them."""
        if count >= len(part.rows):
            rows = list(part.rows)
            self.remove(part)
            return rows
        rows = [part.rows.popleft() for _ in range(count)]
        nbytes = sum(entry.nbytes for entry in rows)
        part.nbytes -= nbytes
        self._count(self._lines[part.bucket], rows=-count, nbytes=-nbytes)
        return rows

    def remove(self, part: Part) -> None:
        """Remove a part. Nothing happens if it does not wait (any more)."""
        line = self._lines.get(part.bucket)
        if line is None:
            return
        index = bisect_left(line.parts, part.order, key=_order)
        if index == len(line.parts) or line.parts[index] is not part:
            return
        del line.parts[index]
        self._count(line, rows=-len(part.rows), nbytes=-part.nbytes)
        part.rows.clear()
        part.nbytes = 0
        # A bucket holds its model: an empty line would keep an unloaded model in memory.
        if not line.parts:
            del self._lines[part.bucket]

    def head(self, *, longest_s: float = math.inf) -> Part | None:
        """The most urgent part of the buckets in which a row alone takes at most `longest_s`; None
        if nothing waits in one.
        """
        heads = [
            line.parts[0]
            for bucket, line in self._lines.items()
            if longest_s == math.inf or bucket.steady_s <= longest_s
        ]
        return min(heads, key=_order, default=None)

    def head_of(self, bucket: Bucket) -> Part | None:
        """The most urgent part of a bucket; None if nothing waits there."""
        line = self._lines.get(bucket)
        return line.parts[0] if line is not None else None

    def rows_of(self, bucket: Bucket) -> int:
        """The number of rows that wait in a bucket."""
        line = self._lines.get(bucket)
        return line.rows if line is not None else 0

    def __iter__(self) -> Iterator[Bucket]:
        return iter(self._lines)

    def _count(self, line: _Line, *, rows: int, nbytes: int) -> None:
        line.rows += rows
        self.rows += rows
        self.nbytes += nbytes


def _order(part: Part) -> tuple[float, int]:
    return part.order
