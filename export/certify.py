"""Runs the checks on a candidate and gathers their records. Knows the order of the rules and none
of their reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import nn

from evalmode.bundle.certificate import Finding, Record, Severity, Verdict, overall
from evalmode.bundle.errors import ModelRunFailed
from evalmode.export.convert import Converted, convert
from evalmode.export.fingerprint import fingerprint
from evalmode.export.inputs.candidate import Candidate
from evalmode.export.module.forward import seeded
from evalmode.export.module.parts import disturbed
from evalmode.export.rules import (
    baked_noise,
    batch_invariance,
    census,
    dynamic_axes,
    eager_randomness,
    escaped_module,
    held_out,
    non_finite,
    parity,
    repeatability,
)
from evalmode.export.rules.structure import STRUCTURE
from evalmode.export.rules.subject import Subject, as_tensors

Progress = Callable[[str], None]

# The rules that hold the module and its graph against one another, in their order.
_OF_A_SUBJECT: tuple[ModuleType, ...] = (
    baked_noise,
    census,
    dynamic_axes,
    non_finite,
    parity,
    repeatability,
    held_out,
    batch_invariance,
)

# The second export in this process runs under another seed than the first; those in other processes
# have their own.
_SEED, _OTHER_SEED = 0, 1


@dataclass(frozen=True, kw_only=True)
class Certified:
    """What was found: the records, and, when the module's own rules passed, the subject."""

    records: tuple[Record, ...]
    subject: Subject | None = None

    @property
    def passed(self) -> bool:
        """Whether every rule that applies passed."""
        return overall(self.records) is Verdict.PASS


def certify(candidate: Candidate, *, progress: Progress) -> Certified:
    """Judge a candidate by every rule; a module that fails its own rules is not exported at all.

    Never calls `.eval()`. Raises NotConvertible for a module that cannot be written as ONNX.
    """
    records = _check_module(candidate, progress)
    if overall(records) is not Verdict.PASS:
        return Certified(records=records)
    progress("convert")
    subject = subject_of(candidate)
    return Certified(records=records + _check_graph(subject, progress), subject=subject)


def _check_module(candidate: Candidate, progress: Progress) -> tuple[Record, ...]:
    """The rules that need the module alone; one that fails makes an export pointless."""
    progress(escaped_module.RULE)
    escaped = escaped_module.check(candidate.module)
    progress(eager_randomness.RULE)
    return escaped, eager_randomness.check(
        candidate.module, [as_tensors(probe) for probe in candidate.probes]
    )


def subject_of(candidate: Candidate) -> Subject:
    """The candidate's module and the graph that is made of it, ready for the rules."""

    def export(module: nn.Module, seed: int) -> Converted:
        with seeded(seed):
            return convert(
                module,
                candidate.example,
                dynamic_axes=candidate.dynamic_axes,
                outputs=candidate.outputs,
            )

    converted = export(candidate.exported, _SEED)
    return Subject(
        module=candidate.module,
        model=converted.model,
        unoptimised=converted.unoptimised,
        twins=[
            lambda: fingerprint(export(disturbed(candidate.fresh), _OTHER_SEED).model),
            *candidate.twins,
        ],
        probes=candidate.probes,
        rows=candidate.rows,
        dynamic_axes=candidate.dynamic_axes,
        bounds=converted.bounds,
        labelled=candidate.labelled,
        held_out=candidate.held_out,
    )


def _check_graph(subject: Subject, progress: Progress) -> tuple[Record, ...]:
    records = []
    for rule in STRUCTURE:
        progress(rule.RULE)
        records.append(rule.check(subject.graph))
    for rule in _OF_A_SUBJECT:
        progress(rule.RULE)
        records.append(run_rule(rule, subject))
    return tuple(records)


def run_rule(rule: ModuleType, subject: Subject) -> Record:
    """The record of a rule that runs the graph: one that the runtime refuses to run is not
    proven.
    """
    try:
        record: Record = rule.check(subject)
        return record
    except ModelRunFailed as error:
        return could_not_run(
            rule,
            error,
            fix="see rule dynamic-axes: it names the input that the graph does not read",
        )


def could_not_run(rule: ModuleType, error: Exception, *, fix: str) -> Record:
    """The record of a rule that applies and could not run: nothing is proven by it."""
    finding = Finding(severity=Severity.UNPROVEN, why=f"the rule could not run: {error}", fix=fix)
    return Record.of(rule.RULE, [finding], fine="", otherwise="the rule applies and could not run")
