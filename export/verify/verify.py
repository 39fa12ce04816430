"""Verify a bundle or a bare .onnx file: what the graph alone can show, and for a bundle that it is
whole and repeats.

The rules that need the trained module ran at export; a bundle's certificate carries their records.
Knows neither formats nor exit codes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from evalmode.bundle.certificate import Record, Verdict, overall
from evalmode.bundle.manifest import MODEL_FILE
from evalmode.bundle.store import find_bundle, open_bundle
from evalmode.errors import EvalmodeError
from evalmode.export.graph import ModelUnreadable, open_graph, read_graph
from evalmode.export.rules.registry import RULES, Needs, Rule
from evalmode.export.rules.subject import Subject
from evalmode.export.verify import guarded
from evalmode.export.verify.options import DEFAULTS, Options
from evalmode.export.verify.targets import Target


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was found in one file or bundle: by the rules that ran now, and by those that ran when
    it was exported.

    `file` is the ONNX file itself, of a bundle too. `records` also holds a record for each rule
    that does not apply. `excluded` names the rules that nobody asked for.
    """

    path: Path
    file: Path
    records: tuple[Record, ...]
    certified: tuple[Record, ...] = ()
    excluded: tuple[str, ...] = ()

    @property
    def all_records(self) -> tuple[Record, ...]:
        """The records of now and of then."""
        return (*self.records, *self.certified)

    @property
    def verdict(self) -> Verdict:
        """Fail when any rule failed, now or then, else unproven when any is, or when no rule
        passed, else pass.
        """
        return overall(self.all_records)


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """A file or bundle that could not be examined, and the sentence that says why."""

    path: Path
    why: str


Examined = Verified | Unreadable


def examine(target: Target, options: Options = DEFAULTS) -> Examined:
    """Verify a target; what cannot be read is an answer too, and no exception."""
    if target.problem:
        return Unreadable(path=target.path, why=target.problem)
    try:
        return verify(target.path, options)
    except EvalmodeError as error:
        return Unreadable(path=target.path, why=str(error))


def verify(path: Path, options: Options = DEFAULTS) -> Verified:
    """Check a bare .onnx file, or a bundle (its folder, or a folder that holds one), by all but the
    excluded rules.

    Raises ModelUnreadable or BundleError for what cannot be read at all.
    """
    try:
        if path.is_dir():
            return _verify_bundle(find_bundle(path), options)
        return _verify_file(path, options)
    except (EvalmodeError, ImportError):
        raise
    except Exception as error:  # a file may be malformed in ways that no one has listed
        reason = " ".join(str(error).split()) or "it gives no reason"
        kind = type(error).__name__
        raise ModelUnreadable(f"{path} cannot be examined: {kind}: {reason}") from error


def _verify_file(path: Path, options: Options) -> Verified:
    subject = Subject(graph=open_graph(path), file=path)
    run: set[Needs] = set()  # what the rules need that run the file
    if options.samples is not None:
        run = {Needs.RUN} if options.module is None else {Needs.RUN, Needs.COMPARISON}
    rules = [rule for rule in RULES if rule.name not in options.excluded]
    # The structure first: it must be told of a file that cannot be run, too.
    records = {rule.name: _seen(rule, subject) for rule in rules if rule.needs not in run}
    if running := [rule for rule in rules if rule.needs in run]:
        records |= guarded.run_file(subject, running, options)
    return Verified(
        path=path,
        file=path,
        records=tuple(records[rule.name] for rule in rules),
        excluded=_in_order(options.excluded),
    )


def _seen(rule: Rule, subject: Subject) -> Record:
    return rule.check(subject) if subject.has(rule.needs) else rule.not_applicable(subject)


def _verify_bundle(path: Path, options: Options) -> Verified:
    bundle = open_bundle(path)
    assert bundle.certificate is not None, "open_bundle refuses a bundle without a certificate"
    subject = Subject(graph=read_graph(bundle.model, name=str(path)), bundle=bundle)
    rules = [rule for rule in RULES if rule.name not in options.excluded]
    rerun = {rule.name for rule in rules if subject.has(rule.needs)}
    certified = tuple(
        record
        for record in bundle.certificate.records
        if record.rule not in rerun and record.rule not in options.excluded
    )
    known = {record.rule for record in certified}
    records: dict[str, Record] = {}
    for rule in rules:
        if rule.name in rerun and rule.needs is Needs.GRAPH:
            records[rule.name] = rule.check(subject)
        elif rule.needs is Needs.AUDIT and rule.name not in known:
            records[rule.name] = rule.not_applicable(subject)
        elif rule.name not in rerun | known:
            why = "the bundle's certificate has no record of it"
            records[rule.name] = Record.not_applicable(rule.name, why)
    if running := [rule for rule in rules if rule.needs is Needs.BUNDLE]:
        records |= guarded.run_bundle(subject, running, options)
    return Verified(
        path=path,
        file=path / MODEL_FILE,
        records=tuple(records[rule.name] for rule in rules if rule.name in records),
        certified=certified,
        excluded=_in_order(options.excluded),
    )


def _in_order(names: Collection[str]) -> tuple[str, ...]:
    return tuple(rule.name for rule in RULES if rule.name in names)
