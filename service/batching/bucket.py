"""What may share a batch: the bucket, the row as the engine sees it, and how many rows a batch of
it should have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from evalmode.bundle.known_answers import Tensors

Answer: TypeAlias = Tensors


class Row(Protocol):
    """What the engine needs of a row. Only a bucket's `run` looks at `inputs`."""

    @property
    def inputs(self) -> Tensors:
        """Its tensors, by name."""

    @property
    def nbytes(self) -> int:
        """The bytes it holds while it waits."""

    @property
    def tokens(self) -> int:
        """Its positions that are not padding."""

    def described(self) -> str:
        """What identifies the row in a log: equal rows have equal descriptions."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Bucket:
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
        """The smallest row count that may run, used for a row alone."""
        return min(self.costs)

    @property
    def row_cost_s(self) -> float:
        """Seconds of a row in the batch size with the lowest cost per row."""
        return min(cost / count for count, cost in self.costs.items())

    def places_for(self, rows: int) -> int:
        """The row count with the lowest cost per row while `rows` wait. Where it exceeds `rows`,
        copies fill the rest.

        Of equal costs the one with fewer copies, then the larger: fewer batches for the same time.
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


Job: TypeAlias = tuple[Bucket, Row]
