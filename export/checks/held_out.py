"""Rule held-out: on rows that the training never saw, the graph is as accurate as the module, row for row."""

from __future__ import annotations

import numpy as np

from evalmode.bundle.certificate import Record, Verdict
from evalmode.export.subject import Subject

RULE = "held-out"


def check(subject: Subject) -> Record:
    """Fail when the number of right answers differs; not applicable without held-out rows."""
    if subject.held_out is None:
        return Record(rule=RULE, verdict=Verdict.NOT_APPLICABLE, why="no held-out rows came with the module")
    right_module = right_graph = rows = 0
    for batch, labels in zip(subject.held_out.batches, subject.held_out.labels, strict=True):
        (expected,) = subject.reference(batch).values()
        (actual,) = subject.served.run(batch).values()
        right_module += int(np.sum(expected.argmax(-1) == labels))
        right_graph += int(np.sum(actual.argmax(-1) == labels))
        rows += len(labels)
    same = right_module == right_graph
    return Record(
        rule=RULE,
        verdict=Verdict.PASS if same else Verdict.FAIL,
        why=f"accuracy {right_graph / rows:.4f} of the graph, {right_module / rows:.4f} of the module",
        measured=f"{right_graph} right of {rows}",
        limit=f"{right_module} right",
    )
