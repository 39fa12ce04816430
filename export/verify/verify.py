"""Verify a bundle or a bare .onnx file: what the graph alone can show, and for a bundle that it is
whole and repeats.

The rules that need the trained module ran at export; a bundle's certificate carries their records.
Knows neither formats nor exit codes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalmode.bundle.certificate import Finding, Record, Verdict, overall
from evalmode.bundle.errors import KnownAnswersDiffer
from evalmode.bundle.known_answers import replay
from evalmode.bundle.manifest import MODEL_FILE
from evalmode.bundle.session import open_session
from evalmode.bundle.store import Bundle, find_bundle, open_bundle
from evalmode.errors import EvalmodeError
from evalmode.export.graph import Graph, ModelUnreadable, open_graph, read_graph
from evalmode.export.graph.suspicious_weights import mask_like, non_finite_weights
from evalmode.export.rules.registry import KNOWN_ANSWERS, Needs, Rule, every_rule
from evalmode.export.rules.structure import STRUCTURE
from evalmode.export.verify.targets import Target

_STRUCTURE: Mapping[str, Callable[[Graph], Record]] = {rule.RULE: rule.check for rule in STRUCTURE}

# What a graph alone shows of a rule that needs more: a warning, or what would be wrong whatever
# else was at hand.
_GLIMPSES: Mapping[str, Callable[[Graph], tuple[Finding, ...]]] = {
    "baked-noise": mask_like,
    "non-finite": non_finite_weights,
}
# Why a rule does not apply to a bare file, by what it needs.
_LACKING = {
    Needs.MODULE: "it needs the module itself, which `evalmode export` has",
    Needs.RUN: "it needs inputs to run the graph on: give them with --inputs",
    Needs.BUNDLE: "it needs a bundle's known answers",
    Needs.AUDIT: "it needs the module in training, which `evalmode audit` has",
}


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
    def every(self) -> tuple[Record, ...]:
        """The records of now and of then."""
        return (*self.records, *self.certified)

    @property
    def verdict(self) -> Verdict:
        """Fail when any rule failed, now or then, else unproven when any is, or when no rule
        passed, else pass.
        """
        return overall(self.every)


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """A file or bundle that could not be examined, and the sentence that says why."""

    path: Path
    why: str


Examined = Verified | Unreadable


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked beside the structure: rules to leave out, and inputs to run bare files on.

    `samples` map input names to arrays; none at all (an empty sequence) asks for inputs that are
    made of each file's signature. `module` is what the files are to be compared with.
    """

    excluded: Collection[str] = ()
    samples: Sequence[Mapping[str, Any]] | None = None
    module: Any = None


NOTHING_MORE = Asked()


def examine(target: Target, asked: Asked = NOTHING_MORE) -> Examined:
    """Verify a target; what cannot be read is an answer too, and no exception."""
    if target.problem:
        return Unreadable(path=target.path, why=target.problem)
    try:
        return verify(target.path, asked)
    except EvalmodeError as error:
        return Unreadable(path=target.path, why=str(error))


def verify(path: Path, asked: Asked = NOTHING_MORE) -> Verified:
    """Check a bare .onnx file, or a bundle (its folder, or a folder that holds one), by all but the
    excluded rules.

    Raises ModelUnreadable or BundleError for what cannot be read at all.
    """
    try:
        return (
            _bundle(find_bundle(path), asked.excluded) if path.is_dir() else _bare_file(path, asked)
        )
    except (EvalmodeError, ImportError):
        raise
    except (
        Exception
    ) as error:  # a file from anywhere may be malformed in ways that no one has listed
        said = " ".join(str(error).split()) or "it gives no reason"
        raise ModelUnreadable(
            f"{path} cannot be examined: {type(error).__name__}: {said}"
        ) from error


def _bare_file(path: Path, asked: Asked) -> Verified:
    graph = open_graph(path)
    ran = _behaviour(path, graph, asked)
    records = []
    for rule in every_rule():
        if rule.name in asked.excluded:
            continue
        if rule.name in _STRUCTURE:
            records.append(_STRUCTURE[rule.name](graph))
        else:
            records.append(ran.get(rule.name) or _not_applicable(rule, graph))
    return Verified(
        path=path, file=path, records=tuple(records), excluded=_in_order(asked.excluded)
    )


def _behaviour(path: Path, graph: Graph, asked: Asked) -> dict[str, Record]:
    if asked.samples is None:
        return {}
    # loads torch, which structure alone does without
    from evalmode.export.verify.run import behaviour

    return {
        record.rule: record for record in behaviour(path, graph, asked.samples, module=asked.module)
    }


def _not_applicable(rule: Rule, graph: Graph) -> Record:
    found = _GLIMPSES[rule.name](graph) if rule.name in _GLIMPSES else ()
    record = Record.of(
        rule.name, found, fine=_LACKING[rule.needs], otherwise="the graph alone shows it"
    )
    if record.verdict is not Verdict.PASS:
        return record
    # nothing wrong in a glimpse is no pass
    return record.model_copy(update={"verdict": Verdict.NOT_APPLICABLE})


def _bundle(path: Path, excluded: Collection[str]) -> Verified:
    bundle = open_bundle(path)
    assert bundle.certificate is not None, "open_bundle refuses a bundle without a certificate"
    graph = read_graph(bundle.model, name=str(path))
    certified = tuple(
        record
        for record in bundle.certificate.records
        if record.rule not in {*_STRUCTURE, *excluded}
    )
    then = {record.rule for record in certified}
    now = []
    for rule in every_rule():
        if rule.name in excluded or rule.name in then:
            continue
        if rule.name in _STRUCTURE:
            now.append(_STRUCTURE[rule.name](graph))
        elif rule.name == KNOWN_ANSWERS:
            now.append(_known_answers(bundle))
        else:
            audited = rule.needs is Needs.AUDIT
            why = (
                _LACKING[rule.needs] if audited else "the bundle's certificate has no record of it"
            )
            now.append(Record.not_applicable(rule.name, why))
    return Verified(
        path=path,
        file=path / MODEL_FILE,
        records=tuple(now),
        certified=certified,
        excluded=_in_order(excluded),
    )


def _in_order(names: Collection[str]) -> tuple[str, ...]:
    return tuple(rule.name for rule in every_rule() if rule.name in names)


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
