"""The one list of rules, in the order of reports and certificates.

A rule's module is imported when the rule runs: a list of the rules costs no torch, and a file is
verified without it. `python -m evalmode.export.rules.registry` prints the table of the README.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from typing import TYPE_CHECKING

from evalmode.bundle.certificate import Finding, Record, Severity, Verdict
from evalmode.bundle.errors import ModelRunFailed
from evalmode.errors import EvalmodeError

if TYPE_CHECKING:
    from evalmode.export.rules.subject import Subject

Progress = Callable[[str], None]


class Needs(StrEnum):
    """What a subject must have for a rule to apply to it."""

    MODULE = "the module"
    GRAPH = "a graph"
    EXPORT = "the module and its export"
    COMPARISON = "a graph, inputs and the module"
    RUN = "a graph and inputs"
    AUDIT = "the module (`evalmode audit`)"
    BUNDLE = "a bundle"


# Why a rule does not apply, by what it needs and the subject lacks.
_MODULE_LACKS = "it needs the module itself, which `evalmode export` has"
LACKS = {
    Needs.MODULE: _MODULE_LACKS,
    Needs.GRAPH: "it needs a graph",
    Needs.EXPORT: _MODULE_LACKS,
    Needs.COMPARISON: _MODULE_LACKS,
    Needs.RUN: "it needs inputs to run the graph on: give them with --inputs",
    Needs.AUDIT: "it needs the module in training, which `evalmode audit` has",
    Needs.BUNDLE: "it needs a bundle's known answers",
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule's name, its one-sentence statement (no capital, no full stop) and what it needs.

    The module of the name (`escaped-module` -> `evalmode.export.rules.escaped_module`) holds
    `check(subject) -> Record`. With `glimpses` it also holds `glimpse(graph)`: the findings that
    the graph alone shows of a rule that needs more.
    """

    name: str
    needs: Needs
    statement: str
    glimpses: bool = False

    @property
    def module(self) -> str:
        """The module that is imported when the rule runs."""
        return f"evalmode.export.rules.{self.name.replace('-', '_')}"

    def check(self, subject: Subject) -> Record:
        """Judge a subject that has what the rule needs.

        A graph that the runtime refuses to run is not proven by a rule that runs it. Raises
        ModelRunFailed for a bundle that refuses its own known answers: it is not readable at all.
        """
        assert subject.has(self.needs), f"{self.name} needs {self.needs}"
        try:
            record: Record = import_module(self.module).check(subject)
        except ModelRunFailed as error:
            if self.needs is Needs.BUNDLE:
                raise
            fix = "see rule dynamic-axes: it names the input that the graph does not read"
            return self.could_not_run(error, fix=fix)
        assert record.rule == self.name, f"{self.module} answers as {record.rule}"
        return record

    def could_not_run(
        self, error: Exception, *, fix: str, subject: Subject | None = None
    ) -> Record:
        """The record of a rule that applies and could not run: nothing is proven by it.

        What the graph of `subject` shows on its own is told all the same.
        """
        why = f"the rule could not run: {error}"
        findings = [Finding(severity=Severity.UNPROVEN, why=why, fix=fix)]
        if self.glimpses and subject is not None and subject.has(Needs.GRAPH):
            findings += import_module(self.module).glimpse(subject.graph)
        otherwise = "the rule applies and could not run"
        return Record.of(self.name, findings, fine="", otherwise=otherwise)

    def not_applicable(self, subject: Subject) -> Record:
        """The record for a subject that lacks what the rule needs.

        What the graph alone shows is told all the same. Nothing wrong in a glimpse is no pass.
        """
        findings: tuple[Finding, ...] = ()
        if self.glimpses and subject.has(Needs.GRAPH):
            findings = import_module(self.module).glimpse(subject.graph)
        record = Record.of(
            self.name, findings, fine=LACKS[self.needs], otherwise="the graph alone shows it"
        )
        if record.verdict is not Verdict.PASS:
            return record
        return record.model_copy(update={"verdict": Verdict.NOT_APPLICABLE})


RULES: tuple[Rule, ...] = (
    Rule(
        name="escaped-module",
        needs=Needs.MODULE,
        statement="every module is in eval mode, those hidden in Python containers included",
    ),
    Rule(
        name="eager-randomness",
        needs=Needs.MODULE,
        statement="a forward of the eval module draws nothing and repeats itself bit for bit",
    ),
    Rule(
        name="stochastic-op",
        needs=Needs.GRAPH,
        statement="no operator that draws random numbers stands anywhere in the graph",
    ),
    Rule(
        name="training-mode",
        needs=Needs.GRAPH,
        statement="no operator trains (Dropout, BatchNormalization and their kin), and none "
        "normalises by the statistics of the batch",
    ),
    Rule(
        name="opaque-op",
        needs=Needs.GRAPH,
        statement="every operator is one of which it is known whether it draws or trains",
    ),
    Rule(
        name="baked-noise",
        needs=Needs.EXPORT,
        statement="no random number that was drawn at export lives on as a constant of the graph",
        glimpses=True,
    ),
    Rule(
        name="census",
        needs=Needs.EXPORT,
        statement="every place where the module drops in training is named with its rate and is "
        "absent from the graph",
    ),
    Rule(
        name="dynamic-axes",
        needs=Needs.COMPARISON,
        statement="every axis that was declared to vary does, in the graph and when it runs",
    ),
    Rule(
        name="non-finite",
        needs=Needs.RUN,
        statement="no weight is a NaN, and no answer holds a NaN, nor an infinity where the module "
        "has none",
        glimpses=True,
    ),
    Rule(
        name="parity",
        needs=Needs.COMPARISON,
        statement="the graph answers as the eval module does, to rounding, over both ends of every "
        "dynamic axis",
    ),
    Rule(
        name="repeatability",
        needs=Needs.RUN,
        statement="in one session the same input gives the same bits, with graph optimisation off "
        "and as served",
    ),
    Rule(
        name="held-out",
        needs=Needs.EXPORT,
        statement="the graph labels the rows that the training never saw as the module does, so is "
        "as accurate",
    ),
    Rule(
        name="batch-invariance",
        needs=Needs.RUN,
        statement="a row's answer depends on that row and not on who shares its batch",
    ),
    Rule(
        name="expectation-gap",
        needs=Needs.AUDIT,
        statement="every place that drops or adds noise passes on in training, on average, what it "
        "does in eval",
    ),
    Rule(
        name="known-answers",
        needs=Needs.BUNDLE,
        statement="the answers that were written down when the bundle was certified come out again",
    ),
)


class UnknownRule(EvalmodeError):  # noqa: N818 - read as a sentence: "raise UnknownRule"
    """A name that no rule has; the message lists those that there are."""


def check_all(
    subject: Subject, *, skip: Collection[str] = (), progress: Progress = lambda rule: None
) -> tuple[Record, ...]:
    """The records of all rules that apply to the subject, but for those whose names `skip` holds.

    `progress` is called with the name of each rule before it runs.
    """
    records = []
    for rule in RULES:
        if rule.name not in skip and subject.has(rule.needs):
            progress(rule.name)
            records.append(rule.check(subject))
    return tuple(records)


def names_of(names: Iterable[str]) -> frozenset[str]:
    """The same names, each of which a rule has.

    Raises UnknownRule, which lists the rules, for a name that no rule has.
    """
    known = [rule.name for rule in RULES]
    chosen = frozenset(names)
    if strange := sorted(chosen.difference(known)):
        raise UnknownRule(
            f"there is no rule {', '.join(strange)}; the rules are {', '.join(known)}"
        )
    return chosen


def table() -> str:
    """The table of all rules in Markdown, as the README shows it; a newline ends it."""
    rows = [f"| {rule.name} | {rule.statement} | {rule.needs} |" for rule in RULES]
    return "\n".join(["| rule | holds when | needs |", "|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    print(table(), end="")  # noqa: T201 - what it is run for
