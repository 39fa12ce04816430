"""Rule held-out: the graph gives held-out rows the same labels as the module, so it is as
accurate.
"""

from __future__ import annotations

import numpy as np

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.export.rules.subject import Subject

RULE = "held-out"


def check(subject: Subject) -> Record:
    """Fail for a row whose label from the graph differs from the module's.

    Not applicable without held-out rows: rows that the training never saw.
    """
    held_out = subject.evidence.held_out
    if held_out is None:
        return Record.not_applicable(RULE, "no held-out rows came with the module")
    module_right = graph_right = differing = row_count = 0
    for batch, labels in zip(held_out.batches, held_out.labels, strict=True):
        # The label is the largest score of the first output.
        name, scores = next(iter(subject.reference(batch).items()))
        expected, actual = scores.argmax(-1), subject.served.run(batch)[name].argmax(-1)
        module_right += int(np.sum(expected == labels))
        graph_right += int(np.sum(actual == labels))
        differing += int(np.sum(actual != expected))
        row_count += len(labels)
    accuracy = (
        f"accuracy {graph_right / row_count:.4f} of the graph,"
        f" {module_right / row_count:.4f} of the module"
    )
    findings = []
    if differing:
        why = f"the graph gives {differing} of {row_count} held-out rows another label"
        fix = "look at rule parity: the graph computes another function than the module"
        findings.append(Finding(severity=Severity.ERROR, why=why, fix=fix))
    return Record.of(
        RULE,
        findings,
        fine=accuracy,
        otherwise=accuracy,
        measured=f"{graph_right} right of {row_count}, {differing} labelled differently",
        limit=f"{module_right} right, 0 differently",
    )
