"""`evalmode train` as it is called: what it says of the data, and every refusal in one sentence."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

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


def refusal(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 2, process.stderr
    assert process.stderr.startswith("evalmode: ")
    assert process.stderr.count("\n") == 1, process.stderr
    assert "internal error" not in process.stderr
    return process.stderr


def test_training_begins_with_a_summary_of_the_data_and_of_what_is_left_out(tmp_path: Path) -> None:
    labels = ("neg", "pos")
    rows = [(sentence(n), labels[n % 2]) for n in range(100)]
    rows += [(sentence(n), labels[1 - n % 2]) for n in range(60)]
    rows += [("text", "label"), (sentence(99), "pos"), ("", "pos"), ("a text", "")]
    rows += [("a text of a class of its own", "rare")]
    written(tmp_path / "d.csv", rows)
    process = evalmode("train", "--data", "d.csv", *SMALL, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    output = cells(process.stdout.partition("epoch 1/1")[0])
    for line in (
        ["source", "d.csv"],
        ["text column", "text"],
        ["label column", "label"],
        ["rows read", "165"],
        ["left out: header again", "1"],
        ["left out: empty text", "1"],
        ["left out: empty label", "1"],
        ["left out: duplicate", "1"],
        ["left out: contradictory", "120"],
        ["rows used", "41"],
        ["rare", "1", "1", "0", "0"],
    ):
        assert line in output
    assert ["pos", "20"] in [line[:2] for line in output]
    assert "warning: 1 of 3 classes have too few rows for the test part" in process.stdout


def test_a_class_without_test_rows_is_named_after_training_and_in_the_bundle(
    tmp_path: Path,
) -> None:
    rows = [(sentence(n), "rare" if n in (3, 901) else "common") for n in range(1500)]
    written(tmp_path / "d.csv", rows)
    trained = evalmode("train", "--data", "d.csv", *SMALL, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    exported = evalmode("export", "runs/d", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    bundle = evalmode("show", "bundles/d/1", cwd=tmp_path)
    for output in (trained.stdout, bundle.stdout):
        (line,) = (line for line in cells(output) if line[0] == "test")
        assert line[1:3] == ["1.0000", "0.5000 (1 of 2 classes not tested: rare)"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [(sentence(n), ("neg", "pos")[n % 2]) for n in range(3000)]
    return written(tmp_path_factory.mktemp("data") / "d.csv", rows)


@pytest.fixture
def few(data: Path, tmp_path: Path) -> Path:
    """The first rows of the data, for runs whose length does not matter."""
    lines = data.read_text().splitlines(keepends=True)
    (tmp_path / "few.csv").write_text("".join(lines[:201]))
    return tmp_path / "few.csv"


@contextmanager
def small_disk(folder: Path, *options: str) -> Iterator[Path]:
    """A file system in memory at `folder`, which can be full without harm to another."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


LARGER = ["--width", 192]


def test_a_full_disk_at_the_last_checkpoint_leaves_the_earlier_run_and_can_be_resumed(
    few: Path, tmp_path: Path
) -> None:
    train = ["train", "--data", few, *SMALL, *LARGER, "--out", "disk/run"]
    with small_disk(tmp_path / "disk", "size=32m") as disk:
        first = evalmode(*train, cwd=tmp_path)
        assert first.returncode == 0, first.stderr
        before = files_of(disk / "run")
        weights = len(before["model.safetensors"])
        # The state holds the weights, their two moments and the best weights. There is room for
        # these, and for half of what the checkpoint needs.
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filler").write_bytes(bytes(free - round(4.5 * weights)))
        full = refusal(evalmode(*train, "--seed", 1, "--overwrite", cwd=tmp_path))
        assert "cannot be written to disk/run/model.safetensors (No space left on device)" in full
        assert full.endswith(": free disk space or make it writable, then continue with --resume\n")
        assert files_of(disk / "run") == before
        assert {path.name for path in disk.iterdir()} == {"run", "filler"}
        (disk / "filler").unlink()
        later = evalmode(*train, "--seed", 1, "--resume", cwd=tmp_path)
        assert later.returncode == 0, later.stderr
        assert files_of(disk / "run") != before
        assert not (disk / "run/training").exists()


def test_a_full_disk_at_the_first_state_is_left_empty(few: Path, tmp_path: Path) -> None:
    train = ["train", "--data", few, *SMALL, *LARGER, "--out", "disk/run"]
    with small_disk(tmp_path / "disk", "size=1m") as disk:
        full = refusal(evalmode(*train, cwd=tmp_path))
        assert "disk/run/training/state.ckpt cannot be written (No space left on device)" in full
        assert list(disk.iterdir()) == []


def test_a_read_only_disk_is_refused_before_any_work(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=1m", "ro"):
        refused = refusal(
            evalmode("train", "--data", "absent.csv", "--out", "disk/run", cwd=tmp_path)
        )
        assert "no training can be written to disk/run: disk may not be written to" in refused


@pytest.mark.parametrize("mode", ["", "--resume", "--overwrite"])
@pytest.mark.parametrize("out", ["/proc/x", "file/x", "n" * 300])
def test_an_unusable_out_folder_is_one_sentence(
    data: Path, tmp_path: Path, out: str, mode: str
) -> None:
    (tmp_path / "file").touch()
    flags = [mode] if mode else []
    refused = refusal(evalmode("train", "--data", data, *SMALL, "--out", out, *flags, cwd=tmp_path))
    assert f"no training can be written to {out}" in refused
    assert refused.endswith(": choose another --out\n")
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_broken_state_or_a_full_disk_is_one_sentence(data: Path, tmp_path: Path) -> None:
    train = ["train", "--data", data, *SMALL, "--epochs", 50, "--out", "run"]
    state = tmp_path / "run/training/state.ckpt"
    full = refusal(evalmode(*train, cwd=tmp_path, before="ulimit -f 150;"))
    assert "run/training/state.ckpt cannot be written (File too large): free disk space" in full
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
        assert "start over with --overwrite, or choose another --out" in broken
        state.write_bytes(b"")


def test_a_foreign_state_or_record_is_one_sentence_with_one_remedy(
    few: Path, tmp_path: Path
) -> None:
    train = ["train", "--data", few, *SMALL, "--out", "run"]
    process = evalmode(*train, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    before = files_of(tmp_path / "run")
    record, state = tmp_path / "run/checkpoint.json", tmp_path / "run/training/state.ckpt"
    way_out = ": start over with --overwrite, or choose another --out\n"

    record.write_text("{}")
    refused = refusal(evalmode(*train, "--resume", cwd=tmp_path))
    assert (
        refused
        == f"evalmode: {Path('run/checkpoint.json')} has format None, and this evalmode"
        + (f" reads the formats 1 and 2{way_out}")
    )
    record.unlink()
    os.mkfifo(record)
    refused = refusal(evalmode(*train, "--resume", cwd=tmp_path))
    assert refused.endswith(f"run/checkpoint.json is a FIFO and not a regular file{way_out}")
    record.unlink()
    record.write_bytes(before["checkpoint.json"])

    state.parent.mkdir()
    (state.parent / "run.json").write_text("{}")
    buffer = io.BytesIO()
    torch.save({}, buffer)
    body = buffer.getvalue()
    state.write_bytes(hashlib.sha256(body).digest() + body)
    refused = refusal(evalmode(*train, "--resume", cwd=tmp_path))
    assert "run/training/state.ckpt is not the state of a training, since it lacks" in refused
    assert refused.endswith(way_out)
    assert refused.count("start over") == 1
    assert files_of(tmp_path / "run") == before


def test_a_finished_run_is_not_overwritten_and_unreadable_data_is_refused_by_name(
    data: Path, tmp_path: Path
) -> None:
    process = evalmode("train", "--data", data, *SMALL, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    before = (tmp_path / "runs/d/checkpoint.json").read_bytes()
    refused = refusal(evalmode("train", "--data", data, *SMALL, cwd=tmp_path))
    assert "runs/d holds a finished training: use it as it is with --resume" in refused
    resumed = evalmode("train", "--data", data, *SMALL, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "runs/d/checkpoint.json").read_bytes() == before
    overwritten = evalmode("train", "--data", data, *SMALL, "--overwrite", cwd=tmp_path)
    assert overwritten.returncode == 0, overwritten.stderr
    assert (tmp_path / "runs/d/checkpoint.json").read_bytes() == before  # the same bits

    semicolons = tmp_path / "e[1].csv"
    semicolons.write_text(data.read_text().replace(",", ";"))
    refused = refusal(evalmode("train", "--data", semicolons, *SMALL, cwd=tmp_path))
    assert "the header holds one column, 'text;label'" in refused
    separated = evalmode("train", "--data", semicolons, *SMALL, "--separator", ";", cwd=tmp_path)
    assert separated.returncode == 0, separated.stderr
    assert (tmp_path / "runs/e[1]/model.safetensors").exists()
    nonsense = refusal(evalmode("train", "--data", data, "--separator", "::", cwd=tmp_path))
    assert "separator must be one character" in nonsense
