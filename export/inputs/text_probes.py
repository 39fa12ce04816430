"""The inputs on which a text classifier is held against its graph: both ends of every axis,
padding, held-out rows.

Knows no rule.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from evalmode.bundle.frontend import BpeSpec, Ids, NgramSpec, collate
from evalmode.bundle.known_answers import Tensors
from evalmode.export.inputs.evidence import HeldOutBatches

_HELD_OUT_BATCH = 64
# both ends of the certified batch sizes, and the smallest at which rows have a neighbour
_BATCHES = (1, 2, 64)


def probes(rows: Sequence[Ids], spec: NgramSpec | BpeSpec) -> tuple[Tensors, ...]:
    """Batches of 1, 2 and 64 rows at length 1, at every rung of the ladder and at a length in the
    middle.
    """
    middle = (spec.lengths[-1] + spec.lengths[0]) // 2 + 1
    lengths = sorted({1, min(middle, spec.lengths[-1]), *spec.lengths})
    order = np.random.default_rng(0).permutation(len(rows))
    return tuple(
        collate([rows[order[index % len(order)]][:length] for index in range(count)], length=length)
        for length in lengths
        for count in _BATCHES
    )


def held_out(rows: Sequence[Ids], labels: Ids, spec: NgramSpec | BpeSpec) -> HeldOutBatches:
    """Every held-out row, padded to its own rung, in batches of equal length."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_length[spec.padded_length(len(row))].append(index)
    batches = [
        (length, chosen) for length, every in sorted(by_length.items()) for chosen in _chunks(every)
    ]
    return HeldOutBatches(
        batches=[
            collate([rows[index] for index in chosen], length=length) for length, chosen in batches
        ],
        labels=[labels[chosen] for _, chosen in batches],
    )


def _chunks(indices: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(indices), _HELD_OUT_BATCH):
        yield indices[start : start + _HELD_OUT_BATCH]
