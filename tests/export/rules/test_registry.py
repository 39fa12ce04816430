"""The registry is the files of the rules, and the table in the documentation is the registry."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from evalmode.bundle.certificate import Record
from evalmode.export.release import Released
from evalmode.export.rules.registry import (
    RULES,
    Needs,
    Rule,
    UnknownRule,
    require_rule_names,
    table,
)
from evalmode.export.rules.subject import Subject

ROOT = Path(__file__).parents[3]
OTHER_FILES = {"__init__", "registry", "subject"}
FILES = sorted(
    file.stem for file in (ROOT / "export" / "rules").glob("*.py") if file.stem not in OTHER_FILES
)
BY_NAME = {rule.name: rule for rule in RULES}


def test_every_file_is_registered_and_every_registered_rule_has_a_file() -> None:
    assert sorted(name.replace("-", "_") for name in BY_NAME) == FILES


@pytest.mark.parametrize("file", FILES)
def test_a_rule_is_named_after_its_file_and_states_itself_in_the_first_line_of_its_docstring(
    file: str,
) -> None:
    module = import_module(f"evalmode.export.rules.{file}")
    rule: Rule = BY_NAME[module.RULE]
    assert rule.name == file.replace("_", "-")
    assert rule.module == module.__name__
    summary = " ".join((module.__doc__ or "").partition("\n\n")[0].split())
    assert summary == f"Rule {rule.name}: {rule.statement}."
    assert callable(module.check)
    assert hasattr(module, "graph_findings") == rule.has_graph_findings


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule_has_a_test_file_of_its_name(rule: Rule) -> None:
    assert (Path(__file__).parent / f"test_{rule.name.replace('-', '_')}.py").is_file()


def test_rules_that_need_only_a_graph_load_no_torch() -> None:
    """So a file can be verified without torch, by the graph findings of other rules too."""
    rules = [rule.module for rule in RULES if rule.needs is Needs.GRAPH or rule.has_graph_findings]
    program = f"import sys; sys.modules['torch'] = None\nfor name in {rules}: __import__(name)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_subject_without_parts_is_not_applicable_to_any_rule(rule: Rule) -> None:
    record = rule.not_applicable(Subject())
    assert not Subject().has(rule.needs)
    assert record == Record.not_applicable(rule.name, record.why)


def test_a_certificate_holds_the_rules_of_an_export_in_the_order_of_the_registry(
    released: Released,
) -> None:
    records: tuple[Record, ...] = released.certificate.records
    at_export = [rule.name for rule in RULES if rule.needs not in (Needs.AUDIT, Needs.BUNDLE)]
    assert [record.rule for record in records] == at_export


def test_the_table_in_the_documentation_is_that_of_the_registry() -> None:
    page = (ROOT / "docs/certificate.md").read_text()
    between = page.partition("<!-- rules -->\n")[2].partition("<!-- /rules -->")[0]
    assert between == table(), (
        "put the output of `python -m evalmode.export.rules.registry` between the two comments"
    )


def test_the_module_prints_the_table_without_torch() -> None:
    program = (
        "import runpy, sys; sys.modules['torch'] = None\n"
        "runpy.run_module('evalmode.export.rules.registry', run_name='__main__')"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert process.stdout == table()


def test_an_unknown_name_is_refused_in_one_sentence_that_lists_the_rules() -> None:
    assert require_rule_names(["census", "census"]) == {"census"}
    with pytest.raises(
        UnknownRule, match=r"^there is no rule dropout, noise; the rules are escaped-module, "
    ) as raised:
        require_rule_names(["noise", "census", "dropout"])
    assert str(raised.value).endswith(", known-answers")
