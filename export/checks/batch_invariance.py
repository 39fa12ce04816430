"""Rule batch-invariance: a row's answer depends on that row and not on who shares its batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from evalmode.bundle.certificate import Record, Verdict
from evalmode.bundle.known_answers import Tensors
from evalmode.bundle.row_counts import stable_row_counts, stack
from evalmode.export.subject import Subject

RULE = "batch-invariance"

COUNTS = tuple(range(1, 65))
_COMPANIONS = 8  # the batch size at which companions are exchanged


def measure(subject: Subject) -> dict[int, tuple[int, ...]]:
    """By padded length, the batch sizes of 1..64 at which a row has the bits it has alone, as served."""
    return {length: stable_row_counts(subject.served.run, rows, COUNTS) for length, rows in subject.rows.items()}


def check(subject: Subject, row_counts: Mapping[int, Sequence[int]]) -> Record:
    """Fail when exchanging a row's companions, at one batch size, changes its answer by a bit.

    Which batch sizes give the bits of one row alone (`row_counts`, from `measure`) is a property of the runtime's
    kernels and no fault: the service batches by that list. It is reported.
    """
    moved = {length: _moved_by_companions(subject, rows) for length, rows in subject.rows.items()}
    worst = max(moved.values(), default=0.0)
    where = tuple(
        f"length {length}: another row in the batch changes this row's answer by {by:.3g}"
        for length, by in moved.items()
        if by
    )
    return Record(
        rule=RULE,
        verdict=Verdict.FAIL if where else Verdict.PASS,
        why="rows depend on their neighbours" if where else "no row depends on its neighbours",
        measured=f"moved by {worst:.3g}; {_as_alone(row_counts)}",
        limit="0",
        where=where,
    )


def _as_alone(row_counts: Mapping[int, Sequence[int]]) -> str:
    if all(len(counts) == len(COUNTS) for counts in row_counts.values()):
        return f"the bits of one row alone at every batch size 1..{COUNTS[-1]}"
    some = ", ".join(f"{len(counts)} at length {length}" for length, counts in row_counts.items())
    return f"of the batch sizes 1..{COUNTS[-1]}, with the bits of one row alone: {some}"


def _moved_by_companions(subject: Subject, rows: Sequence[Tensors]) -> float:
    """The largest change of the first row's answer as other rows take the places beside it."""
    others = rows[1:] or rows
    answers = []
    for first in range(len(others)):
        companions = stack(others, count=_COMPANIONS - 1, first=first)
        batch = {name: np.concatenate([array, companions[name]]) for name, array in rows[0].items()}
        answers.append(subject.served.run(batch))
    largest = 0.0
    for answer in answers[1:]:
        for name, tensor in answers[0].items():
            if answer[name][0].tobytes() != tensor[0].tobytes():
                difference = np.abs(answer[name][0].astype(np.float64) - tensor[0].astype(np.float64)).max()
                largest = max(largest, float(difference), np.finfo(np.float64).tiny)  # -0.0 for 0.0 is a change too
    return largest
