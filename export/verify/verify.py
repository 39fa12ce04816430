"""Verify a bundle or a bare .onnx file by the rules that can run without the training code.

The record of a rule about a bare file:

1. An excluded rule has no record.
2. If there are inputs, the rules that run the file run in a child process (`guarded`).
3. A rule that needs only the graph is checked here.
4. Any other rule is not applicable, with the reason.

The record of a rule about a bundle:

1. An excluded rule has no record.
2. A rule that needs only the graph is checked here, and the known answers are replayed in a child.
3. For any other rule the certificate's record counts, which was made at the export.
4. A rule without a record in the certificate is not applicable.

The verdict over all records: fail if any rule failed, else unproven if any is unproven or none
passed, else pass. Statements (`export/exact`) change no verdict.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from evalmode.bundle.certificate import Record, Statement, Verdict, overall
from evalmode.bundle.manifest import MODEL_FILE
from evalmode.bundle.store import find_bundle, open_bundle
from evalmode.errors import EvalmodeError
from evalmode.export.exact.limits import Limits
from evalmode.export.exact.statements import statements_of
from evalmode.export.graph import ModelUnreadable, open_graph, read_graph
from evalmode.export.rules.registry import RULES, Needs
from evalmode.export.rules.subject import Subject
from evalmode.export.verify import guarded
from evalmode.export.verify.options import DEFAULTS, Options
from evalmode.export.verify.targets import Target


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The records of one file or bundle.

    `file` is the ONNX file, of a bundle too. `records` are those of the rules that were checked
    now, and of the rules that are not applicable. `certified` are those of the certificate that
    still count. `excluded` names the rules that were left out on request. `statements` are about
    the graph, and change no verdict.
    """

    path: Path
    file: Path
    records: tuple[Record, ...]
    certified: tuple[Record, ...] = ()
    excluded: tuple[str, ...] = ()
    statements: tuple[Statement, ...] = ()

    @property
    def all_records(self) -> tuple[Record, ...]:
        """The records of now, then those of the certificate."""
        return (*self.records, *self.certified)

    @property
    def verdict(self) -> Verdict:
        """Fail if any rule failed, else unproven if any is or none passed, else pass."""
        return overall(self.all_records)


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """A file or bundle that could not be examined, and the sentence that says why."""

    path: Path
    why: str


Examined = Verified | Unreadable


def examine(target: Target, options: Options = DEFAULTS) -> Examined:
    """Verify a target. A target that cannot be read is a result, too, and raises no exception."""
    if target.problem:
        return Unreadable(path=target.path, why=target.problem)
    try:
        return verify(target.path, options)
    except EvalmodeError as error:
        return Unreadable(path=target.path, why=str(error))


def verify(path: Path, options: Options = DEFAULTS) -> Verified:
    """Check a bare .onnx file, a bundle's folder, or a folder that holds one bundle.

    Raises ModelUnreadable or BundleError if the file or the bundle cannot be read at all.

    Example:
        verified = verify(Path("model.onnx"), Options(excluded=["opaque-op"]))
        print(verified.verdict)
    """
    try:
        if path.is_dir():
            return _verify_bundle(find_bundle(path), options)
        return _verify_file(path, options)
    except (EvalmodeError, ImportError):
        raise
    except Exception as error:  # a malformed file may cause errors of any type
        reason = " ".join(str(error).split()) or "it gives no reason"
        kind = type(error).__name__
        raise ModelUnreadable(f"{path} cannot be examined: {kind}: {reason}") from error


def _verify_file(path: Path, options: Options) -> Verified:
    subject = Subject(graph=open_graph(path), file=path)
    needs_of_a_run: set[Needs] = set()
    if options.samples is not None:
        needs_of_a_run.add(Needs.RUN)
        if options.module is not None:
            needs_of_a_run.add(Needs.COMPARISON)

    # The rules of the graph come first: their records count also for a file that cannot be run.
    rules = [rule for rule in RULES if rule.name not in options.excluded]
    records: dict[str, Record] = {}
    for rule in rules:
        if rule.needs in needs_of_a_run:
            continue
        if subject.has(rule.needs):
            records[rule.name] = rule.check(subject)
        else:
            records[rule.name] = rule.not_applicable(subject)

    running = [rule for rule in rules if rule.needs in needs_of_a_run]
    if running:
        records |= guarded.run_file(subject, running, options)
    return Verified(
        path=path,
        file=path,
        records=tuple(records[rule.name] for rule in rules),
        excluded=_in_order(options.excluded),
        statements=statements_of(subject.graph, options.exact),
    )


def _verify_bundle(path: Path, options: Options) -> Verified:
    bundle = open_bundle(path)
    assert bundle.certificate is not None, "open_bundle refuses a bundle without a certificate"
    subject = Subject(graph=read_graph(bundle.model, name=str(path)), bundle=bundle)

    # What is checked again now replaces the certificate's record.
    rules = [rule for rule in RULES if rule.name not in options.excluded]
    rerun = {rule.name for rule in rules if subject.has(rule.needs)}
    certified = tuple(
        record
        for record in bundle.certificate.records
        if record.rule not in rerun and record.rule not in options.excluded
    )
    certified_rules = {record.rule for record in certified}

    records: dict[str, Record] = {}
    for rule in rules:
        if rule.name in rerun:
            if rule.needs is Needs.GRAPH:
                records[rule.name] = rule.check(subject)
        elif rule.name not in certified_rules:
            if rule.needs is Needs.AUDIT:  # a certificate has such a record only after an audit
                records[rule.name] = rule.not_applicable(subject)
            else:
                why = "the bundle's certificate has no record of it"
                records[rule.name] = Record.not_applicable(rule.name, why)

    running = [rule for rule in rules if rule.needs is Needs.BUNDLE]
    if running:
        records |= guarded.run_bundle(subject, running, options)
    # A range that is narrower than the manifest's would prove nothing of what the service accepts.
    limits = options.exact.updated(Limits.of(bundle.manifest))
    return Verified(
        path=path,
        file=path / MODEL_FILE,
        records=tuple(records[rule.name] for rule in rules if rule.name in records),
        certified=certified,
        excluded=_in_order(options.excluded),
        statements=statements_of(subject.graph, limits),
    )


def _in_order(names: Collection[str]) -> tuple[str, ...]:
    """The names of rules in the order of the registry."""
    return tuple(rule.name for rule in RULES if rule.name in names)
