"""Rule non-finite: no weight is a NaN, and no answer holds a NaN, nor an infinity where the module
has none.
"""

from __future__ import annotations

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
    """Fail for a NaN in a weight or an answer, and for an infinity in the graph's answer where the
    module's answer has none.
    """
    findings = list(graph_findings(subject.graph))
    # Each problem of an output is reported once, on the first probe that shows it.
    first_probes: dict[tuple[str, str], int] = {}
    for index, (reference, answer) in enumerate(subject.answers):
        for name, array in answer.items():
            problem = _problem(array, reference.get(name))
            if problem is not None:
                first_probes.setdefault((name, problem), index)
    for (name, problem), index in first_probes.items():
        why = f"{problem}, first on probe {index}"
        findings.append(Finding(severity=Severity.ERROR, node=name, why=why, fix=_FIX))
    return Record.of(
        RULE,
        findings,
        fine="every weight and every answer is a number",
        otherwise="weights or answers are not numbers",
        measured=f"{len(findings)} places, {len(subject.probes)} probes",
        limit="0",
    )


def graph_findings(graph: Graph) -> tuple[Finding, ...]:
    """An error for every weight that holds a NaN."""
    return non_finite_weights(graph)


def _problem(answer: np.ndarray, reference: np.ndarray | None) -> str | None:
    """What is wrong with an answer, or None; `reference` is the module's, None without a module."""
    if not np.issubdtype(answer.dtype, np.floating):
        return None
    if np.isnan(answer).any():
        if reference is not None and np.isnan(reference).any():
            return "the answer holds a NaN, and so does the module's own"
        return "the answer holds a NaN"
    if not np.isinf(answer).any():
        return None
    if reference is not None and np.array_equal(np.isinf(answer), np.isinf(reference)):
        return None
    return "the answer holds an infinity"
