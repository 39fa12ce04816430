"""Rule batch-invariance: a row's answer depends on that row alone, not on the other rows in its
batch.

The rule exchanges the other rows of a batch and compares the bits of a row's answer. The batch size
stays the same: at another size the runtime may choose another kernel, which may round differently.
That is no fault. The record reports the batch sizes that keep a row's bits, and the service uses
only those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.bundle.known_answers import Run, Tensors, bits
from evalmode.export.inputs.evidence import Companions
from evalmode.export.rules.subject import COUNTS, Subject

RULE = "batch-invariance"

_FIX = (
    "quantise statically, not dynamically; give BatchNorm running statistics; do not reduce over"
    " the batch axis; if the batch is not the first axis, declare the axes with --dynamic-axes"
    " NAME=length,batch,_"
)
_WHY_ROWLESS = (
    "it has no axis of rows but changes with the rows, so a row's answer may depend on other rows"
)
_FIX_ROWLESS = "return one value for each row, or do not return this output"

_BATCH_SIZE = 8
# An axis of rows is one that shrinks with the batch. 5 has no factor in common with 8, so no other
# axis shrinks by the same ratio.
_SMALLER_BATCH_SIZE = 5


def check(subject: Subject) -> Record:
    """Fail when other rows in the batch change a bit of a row's answer.

    Every output is judged by itself. Its rows lie on the axis that grows with the batch. An output
    that is the same for all rows depends on none of them. Unproven for an output that has no axis
    of rows but changes with the rows, such as a loss.
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
        changes, rowless = _exchange_companions(subject.served.run, group)
        worst = max([worst, *changes.values()])
        prefix = f"length {length}: " if length else ""
        for name, change in changes.items():
            if change:
                why = f"{prefix}another row in the batch changes this row's answer by {change:.3g}"
                findings.append(Finding(severity=Severity.ERROR, node=name, why=why, fix=_FIX))
        findings += [
            Finding(severity=Severity.UNPROVEN, node=name, why=_WHY_ROWLESS, fix=_FIX_ROWLESS)
            for name in rowless
        ]
    otherwise = "an output mixes the rows of a batch in a way that cannot be judged"
    if worst:
        otherwise = "rows depend on their neighbours"
    return Record.of(
        RULE,
        dict.fromkeys(findings),
        fine="no row depends on its neighbours",
        otherwise=otherwise,
        measured=f"changed by {worst:.3g}; {_stable_counts(subject)}",
        limit="0",
    )


def _stable_counts(subject: Subject) -> str:
    """The batch sizes at which a row has the bits that it has alone, as text for the record."""
    if not subject.evidence.rows:
        return "the service runs no rows of two requests together"
    row_counts = subject.row_counts
    if all(len(counts) == len(COUNTS) for counts in row_counts.values()):
        return f"the bits of one row alone at every batch size 1..{COUNTS[-1]}"
    numbers = []
    for length, counts in row_counts.items():
        numbers.append(f"{len(counts)} at length {length}" if length else str(len(counts)))
    return (
        f"of the batch sizes 1..{COUNTS[-1]}, with the bits of one row alone: {', '.join(numbers)}"
    )


@dataclass(frozen=True)
class _Layout:
    """The axis of an output along which the rows of a batch lie.

    The axis may hold several elements for each row, such as tokens. They lie row by row, or
    `interleaved`: the first elements of all rows, then the second ones, and so on.
    """

    axis: int
    interleaved: bool

    def split(self, tensor: np.ndarray) -> list[np.ndarray]:
        """The part of each of the batch's rows."""
        tensor = np.moveaxis(tensor, self.axis, 0)
        if self.interleaved:
            return [tensor[row::_BATCH_SIZE] for row in range(_BATCH_SIZE)]
        return np.split(tensor, _BATCH_SIZE)


def _exchange_companions(run: Run, group: Companions) -> tuple[dict[str, float], list[str]]:
    """Compare each row's answer among copies of itself with its answer among other rows.

    Returns the largest change of a row's part by output, and the names of the outputs that change
    although they have no such parts.
    """
    count = len(group.rows)
    # Each row in a batch of copies of itself, and one of them in a smaller batch.
    alone = [run(group.batch([index] * _BATCH_SIZE)) for index in range(count)]
    smaller = run(group.batch([0] * _SMALLER_BATCH_SIZE))

    # Each pair of rows, half of the batch each; then all rows together, each at every position.
    half = _BATCH_SIZE // 2
    mixtures = [[first] * half + [second] * half for first, second in combinations(range(count), 2)]
    mixtures += [
        [(first + position) % count for position in range(_BATCH_SIZE)] for first in range(count)
    ]
    mixed = [(indices, run(group.batch(indices))) for indices in mixtures]

    changes: dict[str, float] = {}
    rowless: list[str] = []
    for name, tensor in alone[0].items():
        # The possible layouts, by the shapes in a batch and in a smaller one.
        shape, smaller_shape = tensor.shape, smaller[name].shape
        layouts = []
        if len(shape) == len(smaller_shape):
            sizes = zip(shape, smaller_shape, strict=True)
            for axis, (size, smaller_size) in enumerate(sizes):
                grows_with_rows = smaller_size * _BATCH_SIZE == size * _SMALLER_BATCH_SIZE
                if size and size % _BATCH_SIZE == 0 and grows_with_rows:
                    layouts.append(_Layout(axis, interleaved=False))
                    if size > _BATCH_SIZE:
                        layouts.append(_Layout(axis, interleaved=True))
        if layouts:
            # The layout is not known. If one of them shows rows that depend on themselves alone,
            # it is the right one.
            changes[name] = min(_largest_change(alone, mixed, name, layout) for layout in layouts)
            continue
        for answer in [*alone, *(answer for _, answer in mixed)]:
            if answer[name].shape != tensor.shape or bits(answer[name]) != bits(tensor):
                rowless.append(name)
                break
    return changes, rowless


def _largest_change(
    alone: Sequence[Tensors],
    mixed: Sequence[tuple[list[int], Tensors]],
    name: str,
    layout: _Layout,
) -> float:
    """The largest change of a row's part of an output when other rows share its batch.

    A change of bits is above 0 even if the numbers are equal. A change of shape, or of elements
    that cannot be subtracted, is infinite.
    """
    parts_alone = [layout.split(answer[name]) for answer in alone]
    largest = 0.0
    for indices, answer in mixed:
        if answer[name].shape != alone[0][name].shape:
            return float("inf")
        for position, part in enumerate(layout.split(answer[name])):
            expected = parts_alone[indices[position]][position]
            if bits(part) == bits(expected):
                continue
            change = np.inf
            if part.dtype.kind in "fiub":
                difference = part.astype(np.float64) - expected.astype(np.float64)
                change = float(np.nan_to_num(np.abs(difference).max(), nan=np.inf))
            # -0.0 in place of 0.0 is a change too, though their difference is 0.
            largest = max(largest, change, float(np.finfo(np.float64).tiny))
    return largest
