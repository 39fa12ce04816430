"""`evalmode verify` as a process: exit codes, text for people, and the file of the report."""

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
    HOSTILE,
    LEAK,
    TORN,
    UNDECIDED,
    VERDICTS,
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
    process = run(tree, *arguments)
    assert process.returncode == code, process.stdout
    assert b"Traceback" not in process.stderr


def test_an_unusable_argument_is_one_sentence_on_stderr(tree: Path) -> None:
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
    process = run(tree, ".")
    lines = process.stdout.decode().splitlines()
    headers = [
        line
        for line in lines
        if line and line[0] != " " and line.split()[0] in {*VERDICTS.values()}
    ]
    assert headers == [f"{verdict:<10}  {path}" for path, verdict in VERDICTS.items()]
    assert lines[-1] == "6 files: 2 pass, 2 fail, 1 unproven, 1 unreadable"
    assert "\x1b" not in process.stdout.decode()
    (leak,) = [line for line in lines if line.startswith("  error     training-mode  ")]
    assert plain(HOSTILE) in leak
    assert "What to do: " in leak
    of_a_graph = [rule.name for rule in RULES if rule.needs is Needs.GRAPH]
    assert f"checked now: {', '.join(of_a_graph)}, known-answers" in lines
    assert process.returncode == 2


def test_the_text_is_printable_in_a_terminal_with_another_encoding(tree: Path) -> None:
    process = run(tree, DRAW, PYTHONIOENCODING="ascii")
    assert process.returncode == 1
    assert rb"fail        models/\xe9t\xe9 [/red], 50%2C.onnx" in process.stdout


@pytest.mark.parametrize("format_", ["text", "json", "sarif", "junit", "github"])
def test_output_writes_the_whole_report_into_a_file(
    tree: Path, tmp_path: Path, format_: str
) -> None:
    file = tmp_path / "new" / "été.report"
    process = run(tree, ".", "--format", format_, "--output", str(file))
    assert process.returncode == 2
    assert process.stdout.decode().splitlines() == [
        f"6 files: 2 pass, 2 fail, 1 unproven, 1 unreadable; the report is in {file}"
    ]
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    output = run(tree, ".", "--format", format_).stdout
    # Without --output the reason for an unreadable file is on stderr only.
    if format_ == "text":
        assert f"unreadable  {TORN}\n  {TORN} is not an ONNX model: " in file.read_text()
    else:
        assert file.read_bytes() == output


@pytest.mark.parametrize("output", ["/proc/report.json", "empty", f"{CLEAN}/report.json"])
def test_a_report_that_cannot_be_written_is_one_sentence(tree: Path, output: str) -> None:
    process = run(tree, CLEAN, "--format", "json", "--output", output)
    assert process.returncode == 2
    assert process.stderr.decode().startswith(f"evalmode: no report can be written to {output}: ")
    assert process.stderr.count(b"\n") == 1
    assert process.stdout == b""


@pytest.mark.parametrize(("files", "has_bar"), [(20, True), (19, False)])
def test_a_terminal_shows_a_progress_bar_from_twenty_files(
    tree: Path, tmp_path: Path, files: int, has_bar: bool
) -> None:
    for index in range(files):
        shutil.copy(tree / CLEAN, tmp_path / f"{index}.onnx")
    terminal_end, process_end = pty.openpty()
    program = [Path(sys.executable).with_name("evalmode"), "verify", "."]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.run(
        program,
        stdout=subprocess.PIPE,
        stderr=process_end,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    os.close(process_end)
    output = b""
    try:
        while more := os.read(terminal_end, 65536):
            output += more
    except OSError:  # a pseudo-terminal whose other side is closed ends so
        pass
    os.close(terminal_end)
    assert (b"verify" in output) is has_bar
    assert process.stdout.decode().splitlines()[-1].startswith(f"{files} files: {files} pass")
    assert run(tmp_path, ".").stderr == b"", "without a terminal there is no bar"


def test_two_thousand_models_take_less_than_a_minute(tmp_path: Path) -> None:
    cases = onnx.backend.test.loader.load_model_tests(kind="node")
    for case in cases:
        (tmp_path / f"{case.name}.onnx").write_bytes(case.model.SerializeToString())
    start = time.monotonic()
    report = as_json(tmp_path, ".")
    assert time.monotonic() - start < 60
    assert [file["path"] for file in report["files"]] == sorted(
        f"{case.name}.onnx" for case in cases
    )
    assert report["summary"]["unreadable"] == 0
    assert report["summary"]["files"] > 1800
