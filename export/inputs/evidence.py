"""The inputs on which a module and its graph are judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from evalmode.bundle.frontend import Ids
from evalmode.bundle.known_answers import Tensors


@dataclass(frozen=True, kw_only=True)
class HeldOutBatches:
    """Batches of rows that the training never saw, and for each row the index of its label."""

    batches: Sequence[Tensors]
    labels: Sequence[Ids]


@dataclass(frozen=True, kw_only=True)
class Companions:
    """Single rows of equal shapes, which may share a batch.

    rows      the inputs of each row, of size 1 on the axis of rows
    axes      input -> the axis of rows, for the inputs that have one
    shared    the other inputs, which all rows of a batch have in common
    """

    rows: Sequence[Tensors]
    axes: Mapping[str, int]
    shared: Tensors = field(default_factory=dict)

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The inputs of a batch of the rows with these indices, in this order."""
        inputs = {
            name: np.concatenate([self.rows[index][name] for index in indices], axis=axis)
            for name, axis in self.axes.items()
        }
        return {**inputs, **self.shared}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The inputs that rules run a module and its graph on.

    probes          batches that reach both ends of every dynamic axis
    rows            padded length -> single rows, where the service may batch them: every input
                    and every output has its rows on the first axis
    companions      length -> rows, where the service may not batch them: some input has its rows
                    on another axis or is shared by all rows, or some output has no rows
    dynamic_axes    input -> index of an axis that varies -> its name
    labelled        whether the index of the largest number of the first output is a label
    held_out        rows that the training never saw, with their labels
    """

    probes: Sequence[Tensors]
    rows: Mapping[int, Sequence[Tensors]] = field(default_factory=dict)
    companions: Mapping[int, Companions] = field(default_factory=dict)
    dynamic_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    labelled: bool = False
    held_out: HeldOutBatches | None = None
