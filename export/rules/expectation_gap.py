"""Rule expectation-gap: every place that drops or adds noise passes on in training, on average,
what it does in eval.
"""

from __future__ import annotations

from evalmode.bundle.certificate import Record
from evalmode.export.rules.subject import Subject

RULE = "expectation-gap"


def check(subject: Subject) -> Record:
    """The record of the audit, which names every site: see `evalmode.export.audit`."""
    return subject.audit.record
