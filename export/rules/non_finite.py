"""Rule non-finite: no weight is a NaN, and no answer holds a NaN, nor an infinity where the module
has none.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.export.graph import Graph
from evalmode.export.graph.suspicious_weights import non_finite_weights
from evalmode.export.rules.subject import Subject

RULE = "non-finite"

_FIX = (
    "look for a division by zero, a logarithm of zero, a row that is masked out entirely, or an"
    " overflow in fp16"
)


def check(subject: Subject) -> Record:
    """Fail for a NaN anywhere, and for an infinity that the graph answers with and the module does
    not.
    """
    findings = [*glimpse(subject.graph), *_answers(subject)]
    return Record.of(
        RULE,
        findings,
        fine="every weight and every answer is a number",
        otherwise="weights or answers are not numbers",
        measured=f"{len(findings)} places, {len(subject.probes)} probes",
        limit="0",
    )


def glimpse(graph: Graph) -> tuple[Finding, ...]:
    """An error for every weight that holds a NaN, which the graph alone shows."""
    return non_finite_weights(graph)


def _answers(subject: Subject) -> Iterator[Finding]:
    said: set[tuple[str, str]] = set()
    for index, (right, found) in enumerate(subject.answers):
        for name, answer in found.items():
            why = _problem(answer, right.get(name))
            if why and (name, why) not in said:
                said.add((name, why))
                yield Finding(
                    severity=Severity.ERROR,
                    node=name,
                    why=f"{why}, first on probe {index}",
                    fix=_FIX,
                )


def _problem(answer: np.ndarray, reference: np.ndarray | None) -> str | None:
    if not np.issubdtype(answer.dtype, np.floating):
        return None
    if np.isnan(answer).any():
        both = reference is not None and np.isnan(reference).any()
        return (
            "the answer holds a NaN, the module's own does too"
            if both
            else "the answer holds a NaN"
        )
    if np.isinf(answer).any() and (
        reference is None or not np.array_equal(np.isinf(answer), np.isinf(reference))
    ):
        return "the answer holds an infinity"
    return None
