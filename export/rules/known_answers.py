"""Rule known-answers: the bundle reproduces the answers that were recorded when it was
certified.
"""

from __future__ import annotations

from evalmode.bundle.certificate import Record, Verdict
from evalmode.bundle.errors import KnownAnswersDiffer
from evalmode.bundle.known_answers import replay
from evalmode.bundle.session import open_session
from evalmode.export.rules.subject import Subject

RULE = "known-answers"


def check(subject: Subject) -> Record:
    """Fail if an answer differs from the recorded one by more than the certificate allows."""
    bundle = subject.bundle
    assert bundle.certificate is not None, "open_bundle refuses a bundle without a certificate"
    session = open_session(bundle.model)
    try:
        replayed = replay(
            bundle.known_answers(),
            session.run,
            certificate=bundle.certificate,
            platform=session.platform,
            frontend=bundle.frontend(),
        )
    except KnownAnswersDiffer as error:
        return Record(rule=RULE, verdict=Verdict.FAIL, why=str(error))
    difference = f"{replayed.largest_difference:.2e} standard deviations"
    return Record(
        rule=RULE,
        verdict=Verdict.PASS,
        why=f"the known answers come out {replayed}",
        measured=f"{replayed.answers} answers, {difference}",
        limit=f"{replayed.tolerance:g}",
    )
