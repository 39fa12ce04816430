"""One batch: the rows that run together, filled up with copies to a row count that may run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evalmode.service.batching.bucket import Answer, Bucket, Row
from evalmode.service.batching.ticket import Ticket
from evalmode.service.errors import RequestError, RunFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of one bucket, each with its ticket and its place in that ticket, and the row count that
    they run with.

    `pressed` is whether other rows were left waiting when the batch was made.
    """

    bucket: Bucket
    entries: Sequence[tuple[Ticket, int, Row]]
    places: int
    pressed: bool = False

    @property
    def rows(self) -> list[Row]:
        """Its rows, without copies."""
        return [row for _, _, row in self.entries]

    @property
    def shared(self) -> bool:
        """Whether rows of several requests are in it."""
        first = self.entries[0][0]
        return any(ticket is not first for ticket, _, _ in self.entries)

    def single_rows(self) -> list[Batch]:
        """A batch for each of its rows."""
        return [
            Batch(bucket=self.bucket, entries=[entry], places=self.bucket.smallest)
            for entry in self.entries
        ]


def run_filled(bucket: Bucket, rows: Sequence[Row], *, places: int) -> Sequence[Answer | Exception]:
    """The outcomes of `rows`, run with copies of the last one up to `places`. Raises whatever `run`
    raises.
    """
    answers = bucket.run([*rows, *[rows[-1]] * (places - len(rows))])
    if len(answers) != places:
        raise RunFailed(
            f"the model answered {len(answers)} of {places} rows of a batch: its outputs lose rows"
        )
    return answers[: len(rows)]


def as_request_error(error: BaseException) -> RequestError:
    """The error for the caller: `error` itself if it is a RequestError, else RunFailed with it as
    the cause.
    """
    if isinstance(error, RequestError):
        return error
    failure = RunFailed("the model failed on the rows of this request")
    failure.__cause__ = error
    return failure
