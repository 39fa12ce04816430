"""The rows that wait, most urgent first: a pure data structure, without threads and without a
clock.

Rows of one request in one bucket wait together, as a `Part`, because they have one urgency. So
parts are sorted and removed, not single rows. What leaves is removed at once; nothing is marked and
kept.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from evalmode.service.batching.bucket import Bucket, Row
from evalmode.service.batching.ticket import Part


class _Line:
    """The parts of one bucket, sorted, and the number of their rows."""

    __slots__ = ("parts", "rows")

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.rows = 0


class Waiting:
    """All that waits, by bucket, and how much: `rows` and `nbytes`."""

    def __init__(self) -> None:
        self.rows = 0
        self.nbytes = 0
        self._lines: dict[Bucket, _Line] = {}

    def add(self, part: Part) -> None:
        """Add a part; it has at least one row."""
        assert part.rows, "a part that waits has rows"
        line = self._lines.get(part.bucket)
        if line is None:
            line = self._lines[part.bucket] = _Line()
        insort(line.parts, part, key=_order)
        self._count(line, rows=len(part.rows), nbytes=part.nbytes)

    def take(self, part: Part, count: int) -> list[tuple[int, Row]]:
        """Remove the first `count` rows of a part, or all if there are fewer; each with its
        place.
        """
        if count >= len(part.rows):
            rows = [(place, row) for place, row, _ in part.rows]
            self.remove(part)
            return rows
        rows, nbytes = [], 0
        for _ in range(count):
            place, row, size = part.rows.popleft()
            rows.append((place, row))
            nbytes += size
        part.nbytes -= nbytes
        self._count(self._lines[part.bucket], rows=-count, nbytes=-nbytes)
        return rows

    def remove(self, part: Part) -> None:
        """Remove a part; nothing happens where it does not wait (any more)."""
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
        if not line.parts:
            del self._lines[part.bucket]  # a bucket of a model that is gone must not be kept

    def head(self, bucket: Bucket | None = None) -> Part | None:
        """The most urgent part, of `bucket` or of all."""
        if bucket is not None:
            line = self._lines.get(bucket)
            return line.parts[0] if line is not None else None
        return min((line.parts[0] for line in self._lines.values()), key=_order, default=None)

    def rows_of(self, bucket: Bucket) -> int:
        """The number of rows that wait in a bucket."""
        line = self._lines.get(bucket)
        return line.rows if line is not None else 0

    def __iter__(self) -> Iterator[Bucket]:
        """The buckets in which rows wait."""
        return iter(self._lines)

    def _count(self, line: _Line, *, rows: int, nbytes: int) -> None:
        line.rows += rows
        self.rows += rows
        self.nbytes += nbytes


def _order(part: Part) -> tuple[float, int]:
    return part.order
