"""The one list of rules, in the order of reports and certificates.

To add a rule `few-nodes`:

1. Write `few_nodes.py` beside this file. Its docstring begins `Rule few-nodes: STATEMENT.`, it has
   `RULE = "few-nodes"`, and `check(subject) -> Record` judges a subject (`subject.py`).
   `escaped_module.py` is a short example.
2. Add an entry to `RULES` below: its name, what it needs, and the same statement.
3. Write its test, and put the table that `python -m evalmode.export.rules.registry` prints into
   `docs/certificate.md`.

A rule's file is imported when the rule runs. So listing the rules needs no torch, and neither does
verifying a file.
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
    """What a subject must have for a rule to apply. The table in the docs shows the texts."""

    MODULE = "the module"
    GRAPH = "a graph"
    EXPORT = "the module and its export"
    COMPARISON = "a graph, inputs and the module"
    RUN = "a graph and inputs"
    AUDIT = "the module (`evalmode audit`)"
    BUNDLE = "a bundle"


# Why a rule with these needs does not apply to a subject that lacks them.
_NO_MODULE = "it needs the module itself, which `evalmode export` has"
_WHY_NOT_APPLICABLE = {
    Needs.MODULE: _NO_MODULE,
    Needs.GRAPH: "it needs a graph",
    Needs.EXPORT: _NO_MODULE,
    Needs.COMPARISON: _NO_MODULE,
    Needs.RUN: "it needs inputs to run the graph on: give them with --inputs",
    Needs.AUDIT: "it needs the module in training, which `evalmode audit` has",
    Needs.BUNDLE: "it needs a bundle's known answers",
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule: its name, its one-sentence statement (no capital, no full stop) and what it needs.

    The module of that name (`escaped-module` -> `evalmode.export.rules.escaped_module`) holds
    `check(subject) -> Record`. With `has_graph_findings` it also holds `graph_findings(graph)`: the
    part of the rule that a graph alone can show, for subjects that lack the rest.
    """

    name: str
    needs: Needs
    statement: str
    has_graph_findings: bool = False

    @property
    def module(self) -> str:
        """The module that is imported when the rule runs."""
        return f"evalmode.export.rules.{self.name.replace('-', '_')}"

    def check(self, subject: Subject) -> Record:
        """Judge a subject that has what the rule needs.

        A graph that the runtime refuses to run makes the rule unproven. Raises ModelRunFailed only
        for a bundle whose graph refuses its own known answers: such a bundle cannot be read.
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
        """The record of a rule that applies and could not run: unproven.

        It includes what the graph of `subject` shows by itself.
        """
        why = f"the rule could not run: {error}"
        findings = [Finding(severity=Severity.UNPROVEN, why=why, fix=fix)]
        if subject is not None:
            findings += self._graph_findings(subject)
        otherwise = "the rule applies and could not run"
        return Record.of(self.name, findings, fine="", otherwise=otherwise)

    def not_applicable(self, subject: Subject) -> Record:
        """The record for a subject that lacks what the rule needs.

        An error that the graph shows by itself still fails the rule.
        """
        record = Record.of(
            self.name,
            self._graph_findings(subject),
            fine=_WHY_NOT_APPLICABLE[self.needs],
            otherwise="the graph alone shows it",
        )
        # Without an error nothing is proven, because the rule looked at a part only.
        if record.verdict is Verdict.PASS:
            return record.model_copy(update={"verdict": Verdict.NOT_APPLICABLE})
        return record

    def _graph_findings(self, subject: Subject) -> tuple[Finding, ...]:
        if not self.has_graph_findings or not subject.has(Needs.GRAPH):
            return ()
        findings: tuple[Finding, ...] = import_module(self.module).graph_findings(subject.graph)
        return findings


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
        statement="no operator in the graph draws random numbers",
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
        statement="for every operator it is known whether it draws or trains",
    ),
    Rule(
        name="baked-noise",
        needs=Needs.EXPORT,
        statement="no constant of the graph is a random number that was drawn at export",
        has_graph_findings=True,
    ),
    Rule(
        name="census",
        needs=Needs.EXPORT,
        statement="every dropout site of the module is named with its rate and is absent from the "
        "graph",
    ),
    Rule(
        name="dynamic-axes",
        needs=Needs.COMPARISON,
        statement="every axis that was declared dynamic can vary, in the graph and when it runs",
    ),
    Rule(
        name="non-finite",
        needs=Needs.RUN,
        statement="no weight is a NaN, and no answer holds a NaN, nor an infinity where the module "
        "has none",
        has_graph_findings=True,
    ),
    Rule(
        name="parity",
        needs=Needs.COMPARISON,
        statement="the graph gives the same answers as the eval module, up to rounding, at both "
        "ends of every dynamic axis",
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
        statement="the graph gives held-out rows the same labels as the module, so it is as "
        "accurate",
    ),
    Rule(
        name="batch-invariance",
        needs=Needs.RUN,
        statement="a row's answer depends on that row alone, not on the other rows in its batch",
    ),
    Rule(
        name="expectation-gap",
        needs=Needs.AUDIT,
        statement="at every site that drops or adds noise, the mean in training is the value in "
        "eval",
    ),
    Rule(
        name="known-answers",
        needs=Needs.BUNDLE,
        statement="the bundle reproduces the answers that were recorded when it was certified",
    ),
)


class UnknownRule(EvalmodeError):  # noqa: N818 - read as a sentence: "raise UnknownRule"
    """A name that no rule has; the message lists the rules."""


def check_all(
    subject: Subject, *, skip: Collection[str] = (), progress: Progress = lambda rule: None
) -> tuple[Record, ...]:
    """The records of all rules that apply to the subject, except those named in `skip`.

    `progress` is called with the name of each rule before it runs.
    """
    records = []
    for rule in RULES:
        if rule.name not in skip and subject.has(rule.needs):
            progress(rule.name)
            records.append(rule.check(subject))
    return tuple(records)


def require_rule_names(names: Iterable[str]) -> frozenset[str]:
    """The names as a set. Raises UnknownRule, which lists the rules, for a name that no rule has.

    >>> sorted(require_rule_names(["parity", "census"]))
    ['census', 'parity']
    """
    rule_names = [rule.name for rule in RULES]
    chosen = frozenset(names)
    unknown = sorted(chosen.difference(rule_names))
    if unknown:
        raise UnknownRule(
            f"there is no rule {', '.join(unknown)}; the rules are {', '.join(rule_names)}"
        )
    return chosen


def table() -> str:
    """The table of all rules in the documentation, in Markdown; it ends with a newline."""
    lines = ["| rule | holds when | needs |", "|---|---|---|"]
    lines += [f"| {rule.name} | {rule.statement} | {rule.needs} |" for rule in RULES]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")  # noqa: T201 - the module is run to print
