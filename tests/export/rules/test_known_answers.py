"""The rule known-answers: a bundle reproduces its recorded answers, or fails."""

from __future__ import annotations

import dataclasses

import numpy as np

from evalmode.bundle.certificate import Verdict
from evalmode.bundle.known_answers import KnownAnswer, pack
from evalmode.bundle.manifest import KNOWN_ANSWERS_FILE
from evalmode.bundle.store import Bundle, open_bundle
from evalmode.export.release import Released
from evalmode.export.rules import known_answers
from evalmode.export.rules.registry import check_all
from evalmode.export.rules.subject import Subject


def test_a_bundle_reproduces_its_answers(released: Released) -> None:
    bundle = open_bundle(released.path)
    record = known_answers.check(Subject(bundle=bundle))
    assert record.verdict is Verdict.PASS
    assert record.measured.startswith(f"{len(bundle.known_answers())} answers, ")
    assert check_all(Subject(bundle=bundle)) == (record,)


def with_changed_answer(bundle: Bundle) -> Bundle:
    """The bundle with a change to its first known answer."""
    first, *others = bundle.known_answers()
    outputs = {name: np.asarray(array) + 1 for name, array in first.outputs.items()}
    answers = (KnownAnswer(inputs=first.inputs, outputs=outputs, text=first.text), *others)
    contents = {**bundle.contents, KNOWN_ANSWERS_FILE: pack(answers)}
    return dataclasses.replace(bundle, contents=contents)


def test_an_answer_that_differs_fails(released: Released) -> None:
    record = known_answers.check(Subject(bundle=with_changed_answer(open_bundle(released.path))))
    assert record.verdict is Verdict.FAIL
    assert "standard deviations" in record.why
