"""Which rows may share a batch, and how many rows a batch should have.

Two things are chosen for a row, and neither may change a bit of its answer:

1. Its padded length, by its own length alone. The ladder of padded lengths belongs to the bundle's
   front end (`padded_length` in `bundle/frontend.py`). Each length of the ladder has a `Bucket`,
   and `models/model.py` chooses the bucket of a row.
2. The size of its batch. A batch runs only at sizes that were measured to give the bits of a row
   alone (`models/calibration.py`), or proved to. These sizes are the keys of `Bucket.costs`, and
   `Bucket.best_size` chooses one of them.

The padding of a model whose arithmetic is proved to be exact changes no bit either. So its rows may
also run at a longer length, in a batch with rows of that length: see `cheaper_together`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from evalmode.bundle.known_answers import Tensors

Answer: TypeAlias = Tensors

# Rows of several lengths share a batch if that takes at most this share of the time that a batch of
# each length takes. Measured costs are not precise enough for less.
_LARGEST_SHARE = 0.9


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
            of that row. All buckets of a model may have the same one.
        costs: seconds that a batch takes, by its size in rows. A batch runs only at these sizes.
        measured_costs: those of `costs` whose sizes were measured to keep the bits of a row. The
            others are proved to keep them. None if all were measured.
        pads_rows: whether `run` takes shorter rows too and pads them, because it is proved that
            padding changes no bit. Buckets with the same `run` may then share a batch.
        has_steady_time: whether a run takes about as long as `costs` says, whatever its values
            are.
        learns: whether `costs` is a guess until the first row has run, see `learn`.
        smallest_size: the smallest batch size, used for a row alone.
        row_cost_s: seconds of a row at the batch size with the lowest cost per row.
        steady_s: seconds that a row alone takes, whatever its values are. Infinite where that is
            not known.
    """

    model: str
    version: str
    label: str
    positions: int
    run: Callable[[Sequence[Row]], Sequence[Answer | Exception]]
    costs: Mapping[int, float]
    digest: str = ""
    measured_costs: Mapping[int, float] | None = None
    pads_rows: bool = False
    has_steady_time: bool = True
    learns: bool = False
    smallest_size: int = field(init=False)
    row_cost_s: float = field(init=False)
    steady_s: float = field(init=False)

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
        self._is_guess = self.learns
        self._set_costs(self.costs)

    def fall_back(self) -> bool:
        """Run only rows of this length, and only at the measured sizes, from now on. False if that
        is so already.
        """
        if self.measured_costs is None:
            return False
        changes = self.pads_rows or self.costs != self.measured_costs
        self.pads_rows = False
        self._set_costs(self.measured_costs)
        return changes

    def learn(self, run_s: float) -> None:
        """A row of a bucket that `learns` has run, alone, for so many seconds.

        The smallest time counts: the first run allocates memory, and others share the processor.
        """
        if self._is_guess or run_s < self.costs[1]:
            self._is_guess = False
            self._set_costs({1: run_s})

    def distrust(self) -> None:
        """A run took much longer than `costs` says, so that may happen again."""
        self.has_steady_time = False
        self._set_costs(self.costs)

    def _set_costs(self, costs: Mapping[int, float]) -> None:
        """Set the costs, and what follows from them: the queue asks for it with each batch."""
        self.costs = costs
        self.smallest_size = min(costs)
        self.row_cost_s = min(cost / size for size, cost in costs.items())
        is_known = self.has_steady_time and not self._is_guess
        self.steady_s = costs[self.smallest_size] if is_known else math.inf
        self._best_sizes: dict[tuple[int, float], int] = {}

    def best_size(self, rows: int, *, longest_s: float = math.inf) -> int:
        """The batch size with the lowest cost per row while `rows` rows wait.

        Where the size exceeds `rows`, copies fill the batch. Of sizes with equal costs the one with
        fewer copies is best, then the larger one: fewer batches for the same time. No size is
        chosen that takes more than `longest_s`; the smallest one must not.
        """
        # More rows than the largest size change nothing, so the results are few.
        rows = min(rows, max(self.costs))
        size = self._best_sizes.get((rows, longest_s))
        if size is None:
            costs = self.costs
            size = min(
                (size for size in costs if costs[size] <= longest_s),
                key=lambda size: (costs[size] / min(size, rows), max(size - rows, 0), -size),
            )
            self._best_sizes[rows, longest_s] = size
        return size

    def cheapest_size(self, rows: int) -> int:
        """The cheapest batch size that holds `rows` rows. There must be one."""
        return min(
            (size for size in self.costs if size >= rows),
            key=lambda size: (self.costs[size], size),
        )


def cheaper_together(head: Bucket, row_counts: Mapping[Bucket, int]) -> list[Bucket]:
    """The buckets whose rows run in the next batch, from the shortest length to the longest.

    All of their rows run in the last of them, which pads the others. `head` is one of them. It is
    the only one, unless the batch takes at most nine tenths of the time of a batch for each bucket.
    `row_counts` has the rows that wait in each bucket.

    >>> def run(rows):
    ...     return rows
    >>> short, long = (
    ...     Bucket(
    ...         model="m", version="1", label=label, positions=int(label), run=run,
    ...         costs={1: 4, 2: 5}, pads_rows=True,
    ...     )
    ...     for label in ("8", "16")
    ... )
    >>> [bucket.label for bucket in cheaper_together(short, {short: 1, long: 1})]
    ['8', '16']
    """
    buckets = [bucket for bucket in row_counts if bucket.pads_rows and bucket.run is head.run]
    if len(buckets) < 2 or head not in buckets:
        return [head]
    buckets.sort(key=lambda bucket: bucket.positions)

    # Only lengths that follow one another, with all rows that wait at them: a row that is padded
    # past a length at which others run costs more than one that runs with those.
    best, most_saved_s = [head], 0.0
    place = buckets.index(head)
    for last in range(place, len(buckets)):
        costs = buckets[last].costs
        rows, apart_s = 0, 0.0
        for first in range(last, -1, -1):
            bucket = buckets[first]
            count = row_counts[bucket]
            rows += count
            if rows not in costs or count not in bucket.costs:
                break
            apart_s += bucket.costs[count]
            saved_s = apart_s - costs[rows]
            is_worth_it = costs[rows] <= _LARGEST_SHARE * apart_s
            if first <= place and is_worth_it and saved_s > most_saved_s:
                best, most_saved_s = buckets[first : last + 1], saved_s
    return best


# A row and the bucket in which it must run.
Job: TypeAlias = tuple[Bucket, Row]
