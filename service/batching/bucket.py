"""What may share a batch: the bucket, the row as the engine sees it, and how many rows a batch of
it should have.

Knows no queue, no threads, and nothing of HTTP, tokens or ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class SizedRow(Protocol):
    """What every row offers."""

    @property
    def nbytes(self) -> int:
        """The bytes it holds while it waits."""

    @property
    def tokens(self) -> int:
        """Its positions that are not padding."""


Row = TypeVar("Row", bound=SizedRow)
Answer = TypeVar("Answer")


@dataclass(frozen=True, eq=False, kw_only=True)
class Bucket(Generic[Row, Answer]):
    """Rows that may share a batch, and what answers them.

    Two buckets are the same only when they are the same object: a model that is swapped brings
    buckets of its own.

    Attributes:
        model: the model's name, for people and metrics.
        version: the model's version.
        digest: of the model's bundle, for people.
        label: the padded length of its rows, or "other" where rows have no length.
        positions: positions of one padded row; 1 where rows have no length.
        run: answers rows, in their order; an exception in the place of an answer fails that row's
            request alone.
        costs: seconds that a batch of N rows takes; its keys are the row counts at which a batch
            may run.
    """

    model: str
    version: str
    label: str
    positions: int
    run: Callable[[Sequence[Row]], Sequence[Answer | Exception]]
    costs: Mapping[int, float]
    digest: str = ""

    def __post_init__(self) -> None:
        if not self.costs or any(
            count < 1 or not math.isfinite(cost) or cost < 0 for count, cost in self.costs.items()
        ):
            raise ValueError(
                f"costs of bucket {self.model}/{self.version}/{self.label} is {dict(self.costs)}:"
                " it must give at least one row count of 1 or more, each with its seconds"
            )

    @property
    def smallest(self) -> int:
        """The smallest row count that may run: what a row alone is run with."""
        return min(self.costs)

    @property
    def row_cost_s(self) -> float:
        """Seconds that a row takes in the batch that is cheapest for its rows."""
        return min(cost / count for count, cost in self.costs.items())

    def places_for(self, rows: int) -> int:
        """The row count at which a row costs least while `rows` wait; more than `rows` where copies
        must fill it.

        Of equal ones the one with fewer copies, then the larger: fewer batches for the same time.
        """
        return min(
            self.costs,
            key=lambda count: (self.costs[count] / min(count, rows), max(count - rows, 0), -count),
        )

    def cheapest_holding(self, rows: int) -> int:
        """The cheapest row count that holds `rows` in one batch; there must be one."""
        return min(
            (count for count in self.costs if count >= rows),
            key=lambda count: (self.costs[count], count),
        )
