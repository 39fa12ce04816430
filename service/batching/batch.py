"""One batch: the rows that run together, and the copies that fill it up to an allowed size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evalmode.service.batching.bucket import Answer, Bucket, Row
from evalmode.service.batching.ticket import Entry
from evalmode.service.errors import RequestError, RunFailed


@dataclass(slots=True, kw_only=True)
class Batch:
    """Rows that run together.

    Attributes:
        bucket: where it runs: the bucket of all its rows, or of the longest where it pads others.
        entries: its rows, each with its ticket and its position in that request.
        size: the number of rows that it runs with, copies included.
        under_load: whether other rows were waiting when the batch was made.
    """

    bucket: Bucket
    entries: Sequence[Entry]
    size: int
    under_load: bool = False

    @property
    def rows(self) -> list[Row]:
        """Its rows, without copies."""
        return [entry.row for entry in self.entries]

    @property
    def is_shared(self) -> bool:
        """Whether it has rows of several requests."""
        first = self.entries[0].ticket
        return any(entry.ticket is not first for entry in self.entries)

    def single_rows(self) -> list[Batch]:
        """A batch for each of its rows."""
        size = self.bucket.smallest_size
        return [Batch(bucket=self.bucket, entries=[entry], size=size) for entry in self.entries]


def run_filled(bucket: Bucket, rows: Sequence[Row], *, size: int) -> Sequence[Answer | Exception]:
    """The outcomes of `rows`, run as a batch of `size` rows. Copies of the last row fill the batch.

    Raises whatever `run` raises, and RunFailed for a wrong number of answers.
    """
    answers = bucket.run([*rows, *[rows[-1]] * (size - len(rows))])
    if len(answers) != size:
        raise RunFailed(
            f"the model answered {len(answers)} of {size} rows of a batch: its outputs lose rows"
        )
    return answers[: len(rows)]


def as_request_error(error: BaseException) -> RequestError:
    """The error for the caller: `error` itself if it is a RequestError, else RunFailed with `error`
    as its cause.
    """
    if isinstance(error, RequestError):
        return error
    failure = RunFailed("the model failed on the rows of this request")
    failure.__cause__ = error
    return failure
