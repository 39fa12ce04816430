"""The inputs on which a text classifier is compared with its graph: probes and held-out rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from evalmode.bundle.frontend import BpeSpec, Ids, NgramSpec, collate
from evalmode.bundle.known_answers import Tensors
from evalmode.export.inputs.evidence import HeldOutBatches

_HELD_OUT_BATCH_SIZE = 64
# The smallest and the largest certified batch size, and the smallest with a second row.
_PROBE_BATCH_SIZES = (1, 2, 64)


def probes(rows: Sequence[Ids], spec: NgramSpec | BpeSpec) -> tuple[Tensors, ...]:
    """Batches of several sizes: at length 1, at each length of the ladder, and at a middle length.

    The rows are cut to the length, and padded.
    """
    middle = (spec.lengths[-1] + spec.lengths[0]) // 2 + 1
    lengths = sorted({1, min(middle, spec.lengths[-1]), *spec.lengths})
    order = np.random.default_rng(0).permutation(len(rows))
    batches = []
    for length in lengths:
        for size in _PROBE_BATCH_SIZES:
            # The rows repeat where there are fewer than the batch has.
            batch = [rows[order[index % len(order)]][:length] for index in range(size)]
            batches.append(collate(batch, length=length))
    return tuple(batches)


def held_out(rows: Sequence[Ids], labels: Ids, spec: NgramSpec | BpeSpec) -> HeldOutBatches:
    """Every held-out row, padded to its length of the ladder, in batches of equal lengths."""
    indices_by_length: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        indices_by_length[spec.padded_length(len(row))].append(index)
    batches, batch_labels = [], []
    for length, indices in sorted(indices_by_length.items()):
        for start in range(0, len(indices), _HELD_OUT_BATCH_SIZE):
            chunk = indices[start : start + _HELD_OUT_BATCH_SIZE]
            batches.append(collate([rows[index] for index in chunk], length=length))
            batch_labels.append(labels[chunk])
    return HeldOutBatches(batches=batches, labels=batch_labels)
