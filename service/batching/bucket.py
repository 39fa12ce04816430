"""Which rows may share a batch, and how many rows a batch should have.

Two things are chosen for a row, and neither may change a bit of its answer:

1. Its padded length, by its own length alone. The ladder of padded lengths belongs to the bundle's
   front end (`padded_length` in `bundle/frontend.py`). Each length of the ladder has a `Bucket`,
   and `models/model.py` chooses the bucket of a row.
2. The size of its batch. A batch runs only at sizes that were measured to give the bits of a row
   alone (`models/calibration.py`), or proved to. These sizes are the keys of `Bucket.costs`, and
   `Bucket.best_size` chooses one of them.
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

    def description(self) -> str:
        """Identifies the row in a log: equal rows have equal descriptions."""


@dataclass(eq=False, kw_only=True)
class Bucket:
    """Rows that may share a batch, and the function that answers them.

    Buckets are compared by identity: a new version of a model brings new buckets.

    Attributes:
        model: the model's name, for people and metrics.
        version: the model's version.
        digest: the digest of the model's bundle, for people.
        label: the padded length of its rows, or "other" where rows have no length.
        positions: positions of one padded row; 1 where rows have no length.
        run: answers rows, in their order. An exception instead of an answer fails only the request
            of that row.
        costs: seconds that a batch takes, by its size in rows. A batch runs only at these sizes.
        measured_costs: those of `costs` whose sizes were measured to keep the bits of a row. The
            others are proved to keep them. None if all were measured.
    """

    model: str
    version: str
    label: str
    positions: int
    run: Callable[[Sequence[Row]], Sequence[Answer | Exception]]
    costs: Mapping[int, float]
    digest: str = ""
    measured_costs: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        is_valid = bool(self.costs)
        for size, cost in self.costs.items():
            if size < 1 or not math.isfinite(cost) or cost < 0:
                is_valid = False
        if not is_valid:
            raise ValueError(
                f"costs of bucket {self.model}/{self.version}/{self.label} is {dict(self.costs)}:"
                " it must have at least one batch size of 1 or more, each with its seconds"
            )

    def fall_back(self) -> bool:
        """Run only at the measured sizes from now on. False if that is so already."""
        if self.measured_costs is None or self.costs == self.measured_costs:
            return False
        self.costs = self.measured_costs
        return True

    @property
    def smallest_size(self) -> int:
        """The smallest batch size, used for a row alone."""
        return min(self.costs)

    @property
    def row_cost_s(self) -> float:
        """Seconds of a row at the batch size with the lowest cost per row."""
        return min(cost / size for size, cost in self.costs.items())

    def best_size(self, rows: int) -> int:
        """The batch size with the lowest cost per row while `rows` rows wait.

        Where the size exceeds `rows`, copies fill the batch. Of sizes with equal costs the one with
        fewer copies is best, then the larger one: fewer batches for the same time.
        """
        return min(
            self.costs,
            key=lambda size: (self.costs[size] / min(size, rows), max(size - rows, 0), -size),
        )

    def cheapest_size(self, rows: int) -> int:
        """The cheapest batch size that holds `rows` rows. There must be one."""
        return min(
            (size for size in self.costs if size >= rows),
            key=lambda size: (self.costs[size], size),
        )


# A row and the bucket in which it must run.
Job: TypeAlias = tuple[Bucket, Row]
