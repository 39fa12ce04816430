"""The inputs on which a module and its graph are compared, from samples to verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from evalmode.bundle.frontend import Ids
from evalmode.bundle.known_answers import Tensors


@dataclass(frozen=True, kw_only=True)
class HeldOutBatches:
    """Batches of rows that the training never saw, and the index of the right label of each row."""

    batches: Sequence[Tensors]
    labels: Sequence[Ids]


@dataclass(frozen=True, kw_only=True)
class Companions:
    """Single rows of equal shapes that may share a batch.

    `rows` hold the inputs that `axes` names, of size 1 on the axis of rows, which `axes` gives for
    each of them. `shared` holds the other inputs, which all rows of a batch have in common.
    """

    rows: Sequence[Tensors]
    axes: Mapping[str, int]
    shared: Tensors = field(default_factory=dict)

    def batch(self, places: Sequence[int]) -> dict[str, np.ndarray]:
        """The inputs of a batch with these rows, by their indices, in this order."""
        stacked = {
            name: np.concatenate([self.rows[index][name] for index in places], axis=axis)
            for name, axis in self.axes.items()
        }
        return {**stacked, **self.shared}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What every rule that runs something runs it on.

    `probes` are batches that reach both ends of every dynamic axis. `rows` are single rows by
    padded length where the service may batch them: every input and every output has its rows on
    the first axis. `companions` are rows where some input holds them on another axis, or shares
    itself with all rows, or some output has none. `dynamic_axes` names, for each input, the axes
    that vary: {"input_ids": {0: "batch", 1: "length"}}. `labelled` says that the largest number of
    the first output is a label.
    """

    probes: Sequence[Tensors]
    rows: Mapping[int, Sequence[Tensors]] = field(default_factory=dict)
    companions: Mapping[int, Companions] = field(default_factory=dict)
    dynamic_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    labelled: bool = False
    held_out: HeldOutBatches | None = None
