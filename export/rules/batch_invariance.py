"""Rule batch-invariance: a row's answer depends on that row alone, not on the other rows in its
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.bundle.known_answers import Run, Tensors, bits
from evalmode.export.inputs.evidence import Companions
from evalmode.export.rules.subject import COUNTS, Subject

RULE = "batch-invariance"

_FIX = (
    "quantise statically, not dynamically; give BatchNorm running statistics; reduce over no batch"
    " axis; where the first axis is no batch, say so with --dynamic-axes NAME=length,batch,_"
)
_ROWLESS = (
    "it has no axis of rows and changes with them, so what it tells of one row may come from others"
)
_FIX_ROWLESS = "answer with one value for each row, or leave this out of what the module answers"

_PLACES = 8  # the batch size at which companions are exchanged
_FEWER = 5  # another one, which tells the axis of rows from others


def check(subject: Subject) -> Record:
    """Fail when exchanging a row's companions, at one batch size, changes its answer by a bit.

    Every output is judged for itself. Its rows lie on whichever axis grows with them; an output
    that is the same whatever the rows are depends on none. Unproven for an output that has no axis
    of rows and changes with them, such as a loss: what a row has from others cannot be told.

    Which batch sizes give the bits of one row alone (`row_counts`) is a property of the runtime's
    kernels and no fault: the service batches by that list. It is reported.
    """
    groups = subject.evidence.companions or {
        length: Companions(rows=rows, axes=dict.fromkeys(rows[0], 0))
        for length, rows in subject.evidence.rows.items()
    }
    if not groups:
        return Record.not_applicable(RULE, "no input has an axis of rows: nothing shares a batch")
    findings: list[Finding] = []
    worst = 0.0
    for length, group in groups.items():
        changes, rowless = _exchange(subject.served.run, group)
        worst = max([worst, *changes.values()])
        for name, change in changes.items():
            if change:
                at = f"length {length}: " if length else ""
                why = f"{at}another row in the batch changes this row's answer by {change:.3g}"
                findings.append(Finding(severity=Severity.ERROR, node=name, why=why, fix=_FIX))
        findings += [
            Finding(severity=Severity.UNPROVEN, node=name, why=_ROWLESS, fix=_FIX_ROWLESS)
            for name in rowless
        ]
    return Record.of(
        RULE,
        dict.fromkeys(findings),
        fine="no row depends on its neighbours",
        otherwise=(
            "rows depend on their neighbours"
            if worst
            else "an output mixes the rows of a batch in a way that cannot be judged"
        ),
        measured=f"moved by {worst:.3g}; {_as_alone(subject)}",
        limit="0",
    )


def _as_alone(subject: Subject) -> str:
    if not subject.evidence.rows:
        return "the service runs no rows of two requests together"
    row_counts = subject.row_counts
    if all(len(counts) == len(COUNTS) for counts in row_counts.values()):
        return f"the bits of one row alone at every batch size 1..{COUNTS[-1]}"
    some = ", ".join(
        f"{len(counts)} at length {length}" if length else str(len(counts))
        for length, counts in row_counts.items()
    )
    return f"of the batch sizes 1..{COUNTS[-1]}, with the bits of one row alone: {some}"


def _exchange(run: Run, group: Companions) -> tuple[dict[str, float], list[str]]:
    """The largest change of any row's part of each output when other rows take the places beside
    it, and the outputs that have no parts and yet change.

    Each row first fills a batch alone, then shares one with others: every pair, half of the places
    each, and all together, each in every place.
    """
    count = len(group.rows)
    by_row = [run(group.batch([index] * _PLACES)) for index in range(count)]
    fewer = run(group.batch([0] * _FEWER))
    mixed: list[tuple[list[int], Tensors]] = []
    for one, other in combinations(range(count), 2):
        places = [one] * (_PLACES // 2) + [other] * (_PLACES // 2)
        mixed.append((places, run(group.batch(places))))
    for first in range(count):
        places = [(first + place) % count for place in range(_PLACES)]
        mixed.append((places, run(group.batch(places))))
    changes: dict[str, float] = {}
    rowless: list[str] = []
    for name, tensor in by_row[0].items():
        readings = _readings(tensor.shape, fewer[name].shape)
        if readings:
            changes[name] = min(
                _largest_change(by_row, mixed, name, axis, inner) for axis, inner in readings
            )
        elif any(
            answer[name].shape != tensor.shape or bits(answer[name]) != bits(tensor)
            for answer in (*by_row, *(answer for _, answer in mixed))
        ):
            rowless.append(name)
    return changes, rowless


def _readings(shape: Sequence[int], fewer: Sequence[int]) -> list[tuple[int, bool]]:
    """The ways to read rows in an output: the axis, and whether they are its inner part.

    An axis that holds several elements for each row (tokens of all rows in one line) holds them
    row by row, or the rows of each element together. Where several ways are possible and one shows
    rows that depend on themselves alone, they do.
    """
    if len(shape) != len(fewer):
        return []
    readings = []
    for axis, (size, other) in enumerate(zip(shape, fewer, strict=True)):
        if size and size % _PLACES == 0 and other * _PLACES == size * _FEWER:
            readings += [(axis, False)] if size == _PLACES else [(axis, False), (axis, True)]
    return readings


def _largest_change(
    by_row: Sequence[Tensors],
    mixed: Sequence[tuple[list[int], Tensors]],
    name: str,
    axis: int,
    inner: bool,
) -> float:
    def parts(answer: Tensors) -> list[np.ndarray]:
        tensor = np.moveaxis(answer[name], axis, 0)
        if inner:
            return [tensor[place::_PLACES] for place in range(_PLACES)]
        return np.split(tensor, _PLACES)

    alone = [parts(answer) for answer in by_row]
    largest = 0.0
    for places, answer in mixed:
        if answer[name].shape != by_row[0][name].shape:
            return float("inf")
        for place, part in enumerate(parts(answer)):
            expected = alone[places[place]][place]
            if bits(part) == bits(expected):
                continue
            change = np.inf
            if part.dtype.kind in "fiub":
                difference = part.astype(np.float64) - expected.astype(np.float64)
                change = float(np.nan_to_num(np.abs(difference).max(), nan=np.inf))
            # -0.0 for 0.0 is a change too
            largest = max(largest, change, float(np.finfo(np.float64).tiny))
    return largest
