"""The leak matrix: which rule refuses which PyTorch module in eval, in train, and with one child in
train.

`python -m tests.export.leak_matrix > docs/leak-matrix.md` measures it and writes the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from itertools import chain

import onnx

from evalmode.bundle.certificate import Verdict
from evalmode.export.certify import certify
from evalmode.export.convert import NotConvertible
from evalmode.export.inputs.errors import UnusableInputs
from evalmode.export.inputs.samples import candidate_of
from evalmode.export.second_export import exported_elsewhere
from tests.export.leaks import draws, dropouts, hidden, layers, networks
from tests.export.leaks.case import DOES_NOT_RUN, NO_EXPORT, STATES, Case, Rules

FAMILIES = {
    "Dropouts": dropouts.CASES,
    "Noise and masks written by hand": draws.CASES,
    "Layers of torch's": layers.CASES,
    "Where a module or a mode can hide": hidden.CASES,
    "Networks": networks.CASES,
}
CASES = {case.name: case for case in chain.from_iterable(FAMILIES.values())}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The rules that refused a module, and the model if none did."""

    refused: Rules
    model: onnx.ModelProto | None = None


@cache
def measure(name: str, state: str) -> Measured | None:
    """The outcome of `certify` for a module in a state; None if it cannot be in that state."""
    case = CASES[name]
    if case.expected(state) is None:
        return None
    with ExitStack() as stack:
        try:
            candidate = candidate_of(case.module(state), [case.sample])
            if case.reference:
                twin = stack.enter_context(exported_elsewhere(candidate, case.reference))
                candidate = dataclasses.replace(candidate, twins=(twin,))
            certification = certify(candidate, progress=lambda step: None)
        except UnusableInputs:
            return Measured(refused=DOES_NOT_RUN)
        except NotConvertible:
            return Measured(refused=NO_EXPORT)
    good = (Verdict.PASS, Verdict.NOT_APPLICABLE)
    refused = tuple(record.rule for record in certification.records if record.verdict not in good)
    assert certification.passed == (not refused), name
    assert certification.subject is not None or refused, name
    return Measured(
        refused=refused,
        model=certification.subject.graph.proto
        if certification.subject and certification.passed
        else None,
    )


def table() -> str:
    """The text of docs/leak-matrix.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# The leak matrix"
    yield ""
    yield (
        f"{len(CASES)} PyTorch modules, each exported in three states: after `.eval()`, after"
        " `.train()`, and after `.eval()` with one child put back into training.\nA cell says"
        " `certified`, which the tests confirm by another way (the graph in ONNX Runtime without"
        " optimisation, several times, against the module under other seeds), or names the first"
        " rule that refuses.\nThere is no third case: no randomness of training reaches a bundle"
        " in silence."
    )
    yield ""
    by_command = [case.name for case in CASES.values() if case.reference]
    yield (
        "A module is measured as `assert_export_is_clean` does, which is given the module itself."
        f" {len(by_command)} are measured as `evalmode export` does, which builds it a second time"
        " in another process, under other seeds, those of its factory included: what a constructor"
        f" drew is found by the command alone ({'; '.join(by_command)}). What a forward draws and"
        " keeps is found by both, the first forward included. [Where each way of checking"
        " ends](certificate.md)."
    )
    yield ""
    yield (
        "`python -m tests.export.leak_matrix > docs/leak-matrix.md` measures it anew, and "
        "`tests/export/test_leak_matrix.py` fails unless this is what it measures."
    )
    for title, cases in FAMILIES.items():
        yield from (
            "",
            f"## {title}",
            "",
            "| module | in eval | in train | one child in train |",
            "|---|---|---|---|",
        )
        for case in cases:
            yield f"| {case.name} | {' | '.join(_cell(case, state) for state in STATES)} |"


def _cell(case: Case, state: str) -> str:
    measured = measure(case.name, state)
    if measured is None:
        return "has none"
    return measured.refused[0] if measured.refused else "**certified**"


if __name__ == "__main__":
    print(table(), end="")
