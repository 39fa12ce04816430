"""Rule batch-invariance: a row's answer depends on that row and not on who shares its batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.bundle.known_answers import Tensors
from evalmode.bundle.row_counts import stack
from evalmode.export.rules.subject import COUNTS, Subject

RULE = "batch-invariance"

_FIX = (
    "quantise statically, not dynamically; give BatchNorm running statistics; reduce over no batch"
    " axis; where the first axis is no batch, say so with --dynamic-axes NAME=length,batch,_"
)
_PLACES = 8  # the batch size at which companions are exchanged


def check(subject: Subject) -> Record:
    """Fail when exchanging a row's companions, at one batch size, changes its answer by a bit.

    Which batch sizes give the bits of one row alone (`row_counts`) is a property of the runtime's
    kernels and no fault: the service batches by that list. It is reported.
    """
    if not subject.evidence.rows:
        return Record.not_applicable(
            RULE, "not every input and output has a batch axis: no rows share a run"
        )
    moved = {
        length: _moved_by_companions(subject, rows)
        for length, rows in subject.evidence.rows.items()
    }
    worst = max(moved.values(), default=0.0)
    findings = [
        Finding(
            severity=Severity.ERROR,
            why=f"length {length}: another row in the batch changes this row's answer by {by:.3g}",
            fix=_FIX,
        )
        for length, by in moved.items()
        if by
    ]
    return Record.of(
        RULE,
        findings,
        fine="no row depends on its neighbours",
        otherwise="rows depend on their neighbours",
        measured=f"moved by {worst:.3g}; {_as_alone(subject.row_counts)}",
        limit="0",
    )


def _as_alone(row_counts: Mapping[int, Sequence[int]]) -> str:
    if all(len(counts) == len(COUNTS) for counts in row_counts.values()):
        return f"the bits of one row alone at every batch size 1..{COUNTS[-1]}"
    some = ", ".join(f"{len(counts)} at length {length}" for length, counts in row_counts.items())
    return f"of the batch sizes 1..{COUNTS[-1]}, with the bits of one row alone: {some}"


def _moved_by_companions(subject: Subject, rows: Sequence[Tensors]) -> float:
    """The largest change of any row's answer when other rows take the places beside it."""
    among_itself = [subject.served.run(stack([row], count=_PLACES)) for row in rows]
    largest = 0.0
    for places in _compositions(len(rows)):
        answer = subject.served.run(stack([rows[index] for index in places], count=_PLACES))
        for place, index in enumerate(places):
            for name, expected in among_itself[index].items():
                if answer[name][place].tobytes() != expected[place].tobytes():
                    change = np.abs(
                        answer[name][place].astype(np.float64) - expected[place].astype(np.float64)
                    ).max()
                    # -0.0 for 0.0, or a NaN, is a change too
                    largest = max(
                        largest, float(np.nan_to_num(change, nan=np.inf)), np.finfo(np.float64).tiny
                    )
    return largest


def _compositions(rows: int) -> Iterator[list[int]]:
    """Which rows share a batch: every pair, half of the places each, and all together, each in
    every place.
    """
    for one, other in combinations(range(rows), 2):
        yield [one] * (_PLACES // 2) + [other] * (_PLACES // 2)
    for first in range(rows):
        yield [(first + place) % rows for place in range(_PLACES)]
