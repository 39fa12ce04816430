"""Every exit code of `evalmode verify`, what it says to people, and where a report goes; in a
process of its own.
"""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path

import onnx.backend.test.loader
import pytest

from evalmode.export.report.report import plain
from evalmode.export.rules.registry import RULES, Needs
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


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([CLEAN], 0),
        ([BUNDLE, CLEAN], 0),
        ([LEAK], 1),
        ([LEAK, "--allow-unproven"], 1),
        ([LEAK, "--exclude", "training-mode"], 0),
        ([LEAK, "--exclude", "stochastic-op"], 1),
        ([UNDECIDED], 1),
        ([UNDECIDED, "--allow-unproven"], 0),
        ([UNDECIDED, "--allow-unproven", "--fail-on", "warning"], 0),
        ([TORN], 2),
        ([CLEAN, TORN, LEAK], 2),
        (["absent.onnx"], 2),
        (["empty"], 2),
        ([CLEAN, "--exclude", "dropout"], 2),
        ([CLEAN, "--format", "yaml"], 2),
        ([], 2),
    ],
)
def test_the_exit_code_says_pass_finding_or_unusable(
    tree: Path, arguments: list[str], code: int
) -> None:
    ran = run(tree, *arguments)
    assert ran.returncode == code, ran.stdout
    assert b"Traceback" not in ran.stderr


def test_what_is_unusable_is_one_sentence_on_stderr(tree: Path) -> None:
    assert run(tree, "empty").stderr == b"evalmode: empty holds no .onnx file and no bundle\n"
    assert run(tree, CLEAN, "--exclude", "x").stderr.startswith(
        b"evalmode: there is no rule x; the rules are escaped-"
    )
    torn = run(tree, "models", "absent.onnx").stderr.decode().splitlines()
    assert [line.partition(" is ")[0].partition(" cannot ")[0] for line in torn] == [
        "evalmode: absent.onnx",
        f"evalmode: {TORN}",
    ]


def test_the_text_reports_every_file_in_order_and_counts(tree: Path) -> None:
    ran = run(tree, ".")
    lines = ran.stdout.decode().splitlines()
    headers = [
        line for line in lines if line and line[0] != " " and line.split()[0] in {*EVERY.values()}
    ]
    assert headers == [f"{verdict:<10}  {path}" for path, verdict in EVERY.items()]
    assert lines[-1] == "6 files: 2 pass, 2 fail, 1 unproven, 1 unreadable"
    assert "\x1b" not in ran.stdout.decode()
    (leak,) = [line for line in lines if line.startswith("  error     training-mode  ")]
    assert plain(HOSTILE) in leak
    assert "What to do: " in leak
    of_a_graph = [rule.name for rule in RULES if rule.needs is Needs.GRAPH]
    assert f"checked now: {', '.join(of_a_graph)}, known-answers" in lines
    assert ran.returncode == 2


def test_the_text_survives_a_terminal_of_another_encoding(tree: Path) -> None:
    ran = run(tree, DRAW, PYTHONIOENCODING="ascii")
    assert ran.returncode == 1
    assert rb"fail        models/\xe9t\xe9 [/red], 50%2C.onnx" in ran.stdout


@pytest.mark.parametrize("form", ["text", "json", "sarif", "junit", "github"])
def test_a_report_goes_whole_into_the_file_that_is_asked_for(
    tree: Path, tmp_path: Path, form: str
) -> None:
    file = tmp_path / "new" / "été.report"
    ran = run(tree, ".", "--format", form, "--output", str(file))
    assert ran.returncode == 2
    assert ran.stdout.decode().splitlines() == [
        f"6 files: 2 pass, 2 fail, 1 unproven, 1 unreadable; the report is in {file}"
    ]
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    shown = run(tree, ".", "--format", form).stdout
    if form == "text":  # where stderr does not stand beside it, it says why a file is unreadable
        assert f"unreadable  {TORN}\n  {TORN} is not an ONNX model: " in file.read_text()
    else:
        assert file.read_bytes() == shown


@pytest.mark.parametrize("output", ["/proc/report.json", "empty", f"{CLEAN}/report.json"])
def test_a_report_that_cannot_be_written_is_one_sentence(tree: Path, output: str) -> None:
    ran = run(tree, CLEAN, "--format", "json", "--output", output)
    assert ran.returncode == 2
    assert ran.stderr.decode().startswith(f"evalmode: no report can be written to {output}: ")
    assert ran.stderr.count(b"\n") == 1
    assert ran.stdout == b""


@pytest.mark.parametrize(("files", "bar"), [(20, True), (19, False)])
def test_a_terminal_shows_a_bar_from_twenty_files_up(
    tree: Path, tmp_path: Path, files: int, bar: bool
) -> None:
    for place in range(files):
        shutil.copy(tree / CLEAN, tmp_path / f"{place}.onnx")
    ours, theirs = pty.openpty()
    program = [Path(sys.executable).with_name("evalmode"), "verify", "."]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    ran = subprocess.run(
        program, stdout=subprocess.PIPE, stderr=theirs, check=False, cwd=tmp_path, env=environment
    )
    os.close(theirs)
    shown = b""
    try:
        while more := os.read(ours, 65536):
            shown += more
    except OSError:  # a pseudo-terminal whose other side is closed ends so
        pass
    os.close(ours)
    assert (b"verify" in shown) is bar
    assert ran.stdout.decode().splitlines()[-1].startswith(f"{files} files: {files} pass")
    assert run(tmp_path, ".").stderr == b"", "what is no terminal gets no bar"


def test_two_thousand_models_take_less_than_a_minute(tmp_path: Path) -> None:
    cases = onnx.backend.test.loader.load_model_tests(kind="node")
    for case in cases:
        (tmp_path / f"{case.name}.onnx").write_bytes(case.model.SerializeToString())
    start = time.monotonic()
    found = as_json(tmp_path, ".")
    assert time.monotonic() - start < 60
    assert [one["path"] for one in found["files"]] == sorted(f"{case.name}.onnx" for case in cases)
    assert found["summary"]["unreadable"] == 0
    assert found["summary"]["files"] > 1800
