"""`evalmode train` as it is called: what it says of the data, and every refusal in one sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

EVALMODE = Path(sys.executable).with_name("evalmode")
SMALL = ["--epochs", "1", "--width", "16", "--layers", "1", "--heads", "2"]


def sentence(number: int) -> str:
    return f"sentence {number} is {'fine' if number % 2 else 'poor'} on page {number * 3}"


def written(path: Path, rows: Iterable[tuple[str, str]]) -> Path:
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


def evalmode(*arguments: object, cwd: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f'{before} exec "$@"', "bash", str(EVALMODE), *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def cells(output: str) -> list[list[str]]:
    lines = (line.replace("┃", "│") for line in output.splitlines())
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines if "│" in line]


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("evalmode: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "a mistake of ours" not in done.stderr
    return done.stderr


def test_it_first_says_what_it_read_and_what_it_leaves_out(tmp_path: Path) -> None:
    labels = ("neg", "pos")
    rows = [(sentence(n), labels[n % 2]) for n in range(100)]
    rows += [(sentence(n), labels[1 - n % 2]) for n in range(60)]
    rows += [("text", "label"), (sentence(99), "pos"), ("", "pos"), ("a text", "")]
    written(tmp_path / "d.csv", rows)
    done = evalmode("train", "--data", "d.csv", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = cells(done.stdout.partition("epoch 1/1")[0])
    for line in (
        ["source", "d.csv"],
        ["text column", "text"],
        ["label column", "label"],
        ["rows read", "164"],
        ["left out: empty text", "1"],
        ["left out: empty label", "1"],
        ["left out: duplicate", "1"],
        ["left out: contradictory", "120"],
        ["rows used", "41"],
        ["label", "1", "1", "0", "0"],
    ):
        assert line in shown
    assert ["pos", "20"] in [line[:2] for line in shown]
    assert "warning: 1 of 3 classes have too few rows for the test part" in done.stdout


def test_a_class_that_was_not_tested_is_named_up_to_the_bundle(tmp_path: Path) -> None:
    rows = [(sentence(n), "rare" if n in (3, 901) else "common") for n in range(1500)]
    written(tmp_path / "d.csv", rows)
    trained = evalmode("train", "--data", "d.csv", *SMALL, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    exported = evalmode("export", "runs/d", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    shown = evalmode("show", "bundles/d/1", cwd=tmp_path)
    for output in (trained.stdout, shown.stdout):
        (line,) = (line for line in cells(output) if line[0] == "test")
        assert line[1:3] == ["1.0000", "0.5000 (1 of 2 classes not tested: rare)"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [(sentence(n), ("neg", "pos")[n % 2]) for n in range(3000)]
    return written(tmp_path_factory.mktemp("data") / "d.csv", rows)


def test_a_state_that_is_broken_or_finds_no_room_is_one_sentence(
    data: Path, tmp_path: Path
) -> None:
    train = ["train", "--data", data, *SMALL, "--epochs", 50, "--out", "run"]
    state = tmp_path / "run/training/state.ckpt"
    full = refusal(evalmode(*train, cwd=tmp_path, before="ulimit -f 150;"))
    assert "run/training/state.ckpt cannot be written (File too large): make room" in full
    assert not (tmp_path / "run").exists()
    with subprocess.Popen(
        [str(EVALMODE), *map(str, train)], cwd=tmp_path, stdout=subprocess.DEVNULL
    ) as process:
        while not state.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    os.truncate(state, state.stat().st_size - 1000)
    for _ in range(2):
        broken = refusal(evalmode(*train, "--resume", cwd=tmp_path))
        assert "run/training/state.ckpt was cut short or changed" in broken
        assert "begin anew with --overwrite, or choose another --out" in broken
        state.write_bytes(b"")


def test_a_finished_run_is_not_written_over_and_files_are_refused_by_name(
    data: Path, tmp_path: Path
) -> None:
    done = evalmode("train", "--data", data, *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before = (tmp_path / "runs/d/checkpoint.json").read_bytes()
    again = refusal(evalmode("train", "--data", data, *SMALL, cwd=tmp_path))
    assert "runs/d holds a finished training: take it as it is with --resume" in again
    taken = evalmode("train", "--data", data, *SMALL, "--resume", cwd=tmp_path)
    assert taken.returncode == 0, taken.stderr
    assert (tmp_path / "runs/d/checkpoint.json").read_bytes() == before
    anew = evalmode("train", "--data", data, *SMALL, "--overwrite", cwd=tmp_path)
    assert anew.returncode == 0, anew.stderr
    assert (tmp_path / "runs/d/checkpoint.json").read_bytes() == before  # the same bits

    semicolons = tmp_path / "e[1].csv"
    semicolons.write_text(data.read_text().replace(",", ";"))
    refused = refusal(evalmode("train", "--data", semicolons, *SMALL, cwd=tmp_path))
    assert "the header holds one column, 'text;label'" in refused
    given = evalmode("train", "--data", semicolons, *SMALL, "--separator", ";", cwd=tmp_path)
    assert given.returncode == 0, given.stderr
    assert (tmp_path / "runs/e[1]/model.safetensors").exists()
    nonsense = refusal(evalmode("train", "--data", data, "--separator", "::", cwd=tmp_path))
    assert "separator must be one character" in nonsense
