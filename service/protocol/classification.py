"""The classification extension: the best classes of each row of an output, as text. Knows no model.

A class is written `value:index:label`, or `value:index` where no label is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from evalmode.service.errors import BadRequest
from evalmode.service.protocol.datatypes import Array, shown


def classify(scores: Array, count: int, *, labels: Sequence[str] | None, name: str) -> Array:
    """The `count` best classes (all, if there are fewer) of `scores` (N,) or (N, C), best first:
    BYTES (N, count).

    Of equal ones the lower index comes first, and NaN last. Raises BadRequest for an output that
    has no classes.
    """
    if scores.dtype.kind not in "fiu" or scores.ndim not in (1, 2):
        raise BadRequest(
            f"output {shown(name)} has no classes: classification takes numbers of shape [N] or"
            " [N, C]",
            field="outputs",
        )
    rows = scores.reshape(len(scores), -1).tolist()
    known = (
        labels
        if labels is not None and scores.ndim == 2 and len(labels) == scores.shape[1]
        else None
    )
    found = [[_written(row, index, known) for index in _best(row, count)] for row in rows]
    return np.array(found, dtype=object)


def _best(row: Sequence[float], count: int) -> list[int]:
    return sorted(range(len(row)), key=lambda index: (math.isnan(row[index]), -row[index], index))[
        :count
    ]


def _written(row: Sequence[float], index: int, labels: Sequence[str] | None) -> str:
    return (
        f"{row[index]!r}:{index}" if labels is None else f"{row[index]!r}:{index}:{labels[index]}"
    )
