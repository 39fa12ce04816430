"""The registry of rules is the files in checks/, and the README's table is the registry."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from evalmode.bundle.certificate import Record
from evalmode.export.release import Released
from evalmode.export.rules.registry import (
    CHECKS,
    EXPECTATION_GAP,
    KNOWN_ANSWERS,
    Needs,
    Rule,
    UnknownRule,
    every_rule,
    names_of,
    table,
)
from evalmode.export.rules.structure import STRUCTURE

ROOT = Path(__file__).parents[3]
FILES = sorted(
    file.stem
    for file in (ROOT / "export" / "rules").glob("*.py")
    if file.stem not in ("__init__", "registry", "subject", "structure")
)
WITHOUT_A_FILE = (EXPECTATION_GAP, KNOWN_ANSWERS)
BY_NAME = {rule.name: rule for rule in every_rule()}


def test_every_file_in_checks_is_registered_and_every_registered_rule_has_its_file() -> None:
    assert sorted(name.replace("-", "_") for name in BY_NAME if name not in WITHOUT_A_FILE) == FILES


@pytest.mark.parametrize("file", FILES)
def test_a_rule_is_named_after_its_file_and_states_itself_in_the_first_line_of_its_docstring(
    file: str,
) -> None:
    module = import_module(f"{CHECKS}.{file}")
    rule: Rule = BY_NAME[module.RULE]
    assert rule.name == file.replace("_", "-")
    assert (module.__doc__ or "").splitlines()[0] == f"Rule {rule.name}: {rule.statement}."
    assert callable(module.check)


def test_what_needs_a_graph_alone_is_what_verify_runs_on_a_bare_file() -> None:
    assert {rule.name for rule in every_rule() if rule.needs is Needs.GRAPH} == {
        rule.RULE for rule in STRUCTURE
    }


def test_a_certificate_holds_the_rules_of_the_registry_in_its_order(released: Released) -> None:
    records: tuple[Record, ...] = released.certificate.records
    assert [record.rule for record in records] == [
        name for name in BY_NAME if name not in WITHOUT_A_FILE
    ]


def test_the_table_in_the_readme_is_that_of_the_registry() -> None:
    readme = (ROOT / "README.md").read_text()
    between = readme.partition("<!-- rules -->\n")[2].partition("<!-- /rules -->")[0]
    assert between == table(), (
        "put the output of `python -m evalmode.export.rules.registry` between the two comments"
    )


def test_the_table_is_printed_by_the_module_and_needs_no_torch() -> None:
    program = (
        "import runpy, sys; sys.modules['torch'] = None\n"
        "runpy.run_module('evalmode.export.rules.registry', run_name='__main__')"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert shown.stdout == table()


def test_a_name_that_no_rule_has_is_one_sentence_that_lists_the_rules() -> None:
    assert names_of(["census", "census"]) == {"census"}
    with pytest.raises(
        UnknownRule, match=r"^there is no rule dropout, noise; the rules are escaped-module, "
    ) as raised:
        names_of(["noise", "census", "dropout"])
    assert str(raised.value).endswith(", known-answers")
