"""Verify a bundle or a bare .onnx file: what the graph alone can show, and for a bundle that it is whole and repeats.

The rules that need the trained module ran at export; a bundle's certificate carries their records.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from evalmode.bundle.certificate import Record, Verdict
from evalmode.bundle.errors import KnownAnswersDiffer
from evalmode.bundle.known_answers import replay
from evalmode.bundle.session import open_session
from evalmode.bundle.store import Bundle, find_bundle, open_bundle
from evalmode.export.checks import stochastic_op, training_mode
from evalmode.export.graph import ModelUnreadable, read_file, read_model

KNOWN_ANSWERS = "known-answers"


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was found in one file or bundle: by the rules that ran now, and by those that ran when it was exported."""

    path: Path
    records: tuple[Record, ...]
    certified: tuple[Record, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no rule failed and none was left unproven, now or then."""
        every = (*self.records, *self.certified)
        return not any(record.verdict in (Verdict.FAIL, Verdict.UNPROVEN) for record in every)


def verify(path: Path) -> Verified:
    """Check a bare .onnx file, or a bundle (its folder, or a folder that holds one).

    Raises ModelUnreadable or BundleError for what cannot be read at all.
    """
    if not path.is_dir():
        return Verified(path=path, records=_structure(read_file(path), name=str(path)))
    bundle = open_bundle(find_bundle(path))
    model = read_model(bundle.model, name=str(bundle.path))
    assert bundle.certificate is not None, "open_bundle refuses a bundle without a certificate"
    checked = (*_structure(model, name=str(bundle.path)), _known_answers(bundle))
    again = {record.rule for record in checked}
    certified = tuple(record for record in bundle.certificate.records if record.rule not in again)
    return Verified(path=bundle.path, records=checked, certified=certified)


def _structure(model: onnx.ModelProto, *, name: str) -> tuple[Record, ...]:
    try:
        return stochastic_op.check(model), training_mode.check(model)
    except Exception as error:  # a file from anywhere may be malformed in ways that no one has listed
        raise ModelUnreadable(f"{name} cannot be examined: {type(error).__name__}: {error}") from error


def _known_answers(bundle: Bundle) -> Record:
    assert bundle.certificate is not None, "open_bundle refuses a bundle without a certificate"
    session = open_session(bundle.model)
    try:
        found = replay(
            bundle.known_answers(),
            session.run,
            certificate=bundle.certificate,
            platform=session.platform,
            frontend=bundle.frontend(),
        )
    except KnownAnswersDiffer as error:
        return Record(rule=KNOWN_ANSWERS, verdict=Verdict.FAIL, why=str(error))
    return Record(
        rule=KNOWN_ANSWERS,
        verdict=Verdict.PASS,
        why=f"the known answers come out {found.verdict}",
        measured=f"{found.answers} answers, {found.largest_difference:.2e} standard deviations",
        limit=f"{found.tolerance:g}",
    )
