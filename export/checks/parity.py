"""Rule parity: the graph answers as the eval module does, to rounding, over both ends of every dynamic axis."""

from __future__ import annotations

import numpy as np

from evalmode.bundle.certificate import TOLERANCE, Record, Verdict, relative_difference
from evalmode.export.subject import Subject

RULE = "parity"


def check(subject: Subject) -> Record:
    """Fail when max|difference| over the reference's standard deviation exceeds the tolerance, or a label flips.

    The deviation is that of the output over all probes: one row's own may be as small as one likes. A NaN or an
    infinity, on either side, in a shape or in a type that differs is a failure and never a large number.
    """
    pairs = [(subject.reference(probe), subject.served.run(probe)) for probe in subject.probes]
    worst, flipped, rows, where = 0.0, 0, 0, []
    for name in pairs[0][0]:
        expected = np.concatenate([reference[name].reshape(-1) for reference, _ in pairs])
        for index, (reference, answer) in enumerate(pairs):
            shape = str({key: list(array.shape) for key, array in subject.probes[index].items()})
            if problem := _problem(reference[name], answer[name]):
                where.append(f"{name} of probe {index} {shape}: {problem}")
        actual = np.concatenate([answer[name].reshape(-1) for _, answer in pairs])
        difference = relative_difference(actual, expected)
        worst = max(worst, difference)
        if not difference <= TOLERANCE:
            where.append(f"{name} differs by {difference:.2e} standard deviations")
        flips = [np.sum(r[name].argmax(-1) != a[name].argmax(-1)) for r, a in pairs if r[name].shape == a[name].shape]
        if any(flips):
            where.append(f"{name} flips {sum(flips)} labels")
        flipped += int(sum(flips))
        rows += sum(reference[name].shape[0] for reference, _ in pairs)
    failed = bool(where)
    return Record(
        rule=RULE,
        verdict=Verdict.FAIL if failed else Verdict.PASS,
        why="the graph answers otherwise than the module" if failed else "the graph answers as the module in eval mode",
        measured=f"{worst:.2e} standard deviations, {flipped} labels flipped, {rows} rows in {len(pairs)} shapes",
        limit=f"{TOLERANCE:g}, 0 flipped",
        where=tuple(where),
    )


def _problem(reference: np.ndarray, answer: np.ndarray) -> str | None:
    if reference.shape != answer.shape:
        return f"shape {list(answer.shape)}, the module's is {list(reference.shape)}"
    if reference.dtype != answer.dtype:
        return f"type {answer.dtype}, the module's is {reference.dtype}"
    if not np.isfinite(reference).all():
        return "the module's own answer is not finite"
    if not np.isfinite(answer).all():
        return "the graph's answer is not finite"
    return None
