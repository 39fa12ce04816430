"""Rule held-out: the graph labels the rows that the training never saw as the module does, so is as accurate."""

from __future__ import annotations

import numpy as np

from evalmode.bundle.certificate import Record, Verdict
from evalmode.export.subject import Subject

RULE = "held-out"


def check(subject: Subject) -> Record:
    """Fail for a row that the graph labels otherwise than the module; not applicable without held-out rows."""
    if subject.held_out is None:
        return Record(rule=RULE, verdict=Verdict.NOT_APPLICABLE, why="no held-out rows came with the module")
    right_module = right_graph = differing = rows = 0
    for batch, labels in zip(subject.held_out.batches, subject.held_out.labels, strict=True):
        name, reference = next(iter(subject.reference(batch).items()))  # the first output is what is classified by
        expected, actual = reference.argmax(-1), subject.served.run(batch)[name].argmax(-1)
        right_module += int(np.sum(expected == labels))
        right_graph += int(np.sum(actual == labels))
        differing += int(np.sum(actual != expected))
        rows += len(labels)
    return Record(
        rule=RULE,
        verdict=Verdict.FAIL if differing else Verdict.PASS,
        why=f"accuracy {right_graph / rows:.4f} of the graph, {right_module / rows:.4f} of the module",
        measured=f"{right_graph} right of {rows}, {differing} labelled otherwise",
        limit=f"{right_module} right, 0 otherwise",
    )
