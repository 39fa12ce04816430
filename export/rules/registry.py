"""The registry of rules: what each is called, what it states, and what it needs to be checked.

Imports no rule: a statement is read from the first line of its module's docstring, so that a list
of the rules costs no torch. `python -m evalmode.export.rules.registry` prints the README's table.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.util import find_spec

from evalmode.errors import EvalmodeError

CHECKS = "evalmode.export.rules"
KNOWN_ANSWERS = "known-answers"


class Needs(StrEnum):
    """What must be at hand for a rule: less than it needs, and it is not applicable."""

    GRAPH = "a graph"
    RUN = "a graph and inputs"
    MODULE = "the module"
    BUNDLE = "a bundle"
    AUDIT = "the module (`evalmode audit`)"


# By the name of the rule's file, in the order in which a report lists them.
_NEEDS = {
    "escaped_module": Needs.MODULE,
    "eager_randomness": Needs.MODULE,
    "stochastic_op": Needs.GRAPH,
    "training_mode": Needs.GRAPH,
    "opaque_op": Needs.GRAPH,
    "baked_noise": Needs.MODULE,
    "census": Needs.MODULE,
    "dynamic_axes": Needs.MODULE,
    "non_finite": Needs.RUN,
    "parity": Needs.MODULE,
    "repeatability": Needs.RUN,
    "held_out": Needs.MODULE,
    "batch_invariance": Needs.RUN,
}
# The two rules without a file in checks/: verify runs one on what a bundle brings along, the other
# is a command.
EXPECTATION_GAP = "expectation-gap"
_OTHERS = (
    (
        EXPECTATION_GAP,
        (
            "every place that drops or adds noise passes on in training, on average, what it does"
            " in eval"
        ),
        Needs.AUDIT,
    ),
    (
        KNOWN_ANSWERS,
        "the answers that were written down when the bundle was certified come out again",
        Needs.BUNDLE,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule's name, its one-sentence statement (no capital, no full stop) and what it needs."""

    name: str
    statement: str
    needs: Needs


class UnknownRule(EvalmodeError):  # noqa: N818 - read as a sentence: "raise UnknownRule"
    """A name that no rule has; the message lists those that there are."""


@cache
def every_rule() -> tuple[Rule, ...]:
    """Every rule that there is, in the order in which reports list them."""
    of_files = (
        Rule(name=file.replace("_", "-"), statement=_statement(file), needs=needs)
        for file, needs in _NEEDS.items()
    )
    return (
        *of_files,
        *(Rule(name=name, statement=statement, needs=needs) for name, statement, needs in _OTHERS),
    )


def names_of(asked: Iterable[str]) -> frozenset[str]:
    """The same names, each of which a rule has. Raises UnknownRule, which lists the rules, for one
    that none has.
    """
    known = [rule.name for rule in every_rule()]
    names = frozenset(asked)
    if strange := sorted(names.difference(known)):
        raise UnknownRule(
            f"there is no rule {', '.join(strange)}; the rules are {', '.join(known)}"
        )
    return names


def table() -> str:
    """The table of all rules in Markdown, as the README shows it; a newline ends it."""
    rows = [f"| {rule.name} | {rule.statement} | {rule.needs} |" for rule in every_rule()]
    return "\n".join(["| rule | holds when | needs |", "|---|---|---|", *rows]) + "\n"


def _statement(file: str) -> str:
    """What the first line of the file's docstring says after `Rule NAME: `."""
    found = find_spec(f"{CHECKS}.{file}")
    assert found is not None, f"{file} is registered and has no file in checks/"
    source = found.loader.get_source(found.name)  # type: ignore[union-attr]
    first = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    _, named, statement = first.partition(f"Rule {file.replace('_', '-')}: ")
    assert named, f"the docstring of checks/{file}.py does not begin with its rule's name"
    return statement.rstrip(".")


if __name__ == "__main__":
    print(table(), end="")  # noqa: T201 - what it is run for
