"""Rule held-out: the graph labels the rows that the training never saw as the module does, so is as
accurate.
"""

from __future__ import annotations

import numpy as np

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.export.rules.subject import Subject

RULE = "held-out"


def check(subject: Subject) -> Record:
    """Fail for a row that the graph labels otherwise than the module; not applicable without
    held-out rows.
    """
    held_out = subject.evidence.held_out
    if held_out is None:
        return Record.not_applicable(RULE, "no held-out rows came with the module")
    right_module = right_graph = differing = rows = 0
    for batch, labels in zip(held_out.batches, held_out.labels, strict=True):
        # the first output is what is classified by
        name, reference = next(iter(subject.reference(batch).items()))
        expected, actual = reference.argmax(-1), subject.served.run(batch)[name].argmax(-1)
        right_module += int(np.sum(expected == labels))
        right_graph += int(np.sum(actual == labels))
        differing += int(np.sum(actual != expected))
        rows += len(labels)
    accuracy = (
        f"accuracy {right_graph / rows:.4f} of the graph, {right_module / rows:.4f} of the module"
    )
    flips = Finding(
        severity=Severity.ERROR,
        why=f"the graph labels {differing} of {rows} held-out rows otherwise than the module",
        fix="look at rule parity: the graph computes another function",
    )
    return Record.of(
        RULE,
        [flips] if differing else [],
        fine=accuracy,
        otherwise=accuracy,
        measured=f"{right_graph} right of {rows}, {differing} labelled otherwise",
        limit=f"{right_module} right, 0 otherwise",
    )
