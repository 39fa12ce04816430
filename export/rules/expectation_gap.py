"""Rule expectation-gap: at every site that drops or adds noise, the mean in training is the value
in eval.
"""

from __future__ import annotations

from evalmode.bundle.certificate import Record
from evalmode.export.rules.subject import Subject

RULE = "expectation-gap"


def check(subject: Subject) -> Record:
    """The record that the audit made, with every site: see `evalmode.export.audit`."""
    return subject.audit.record
