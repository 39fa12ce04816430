"""One text of megabytes among short ones costs a training little more than the short ones do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EVALMODE = Path(sys.executable).parent / "evalmode"
SMALL = ["--epochs", "1", "--width", "16", "--layers", "1", "--heads", "2"]
LONG = {
    "words": "some words and more " * 250_000,
    "one word": "x" * 5_000_000,
}


def cost(folder: Path, long_text: str) -> tuple[float, float]:
    """CPU seconds and peak memory in MB of training with one such text among 60."""
    rows = [f"sentence {number} is {'fine' if number % 2 else 'poor'}" for number in range(60)]
    rows[5] = long_text
    lines = [f"{text},{'pos' if number % 2 else 'neg'}" for number, text in enumerate(rows)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    command = [EVALMODE, "train", "--data", "rows.csv", "--out", "run", *SMALL]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


@pytest.mark.parametrize("text", LONG.values(), ids=LONG.keys())
def test_one_long_text_costs_neither_time_nor_memory(tmp_path, text):
    short, long = tmp_path / "short", tmp_path / "long"
    short.mkdir()
    long.mkdir()
    short_s, short_mb = cost(short, "a short text")
    long_s, long_mb = cost(long, text)
    assert long_mb < 1.2 * short_mb  # uncut: 3 times as much for words
    assert long_s < 2 * short_s  # uncut: 5 to 30 times as much
    assert (long / "run" / "checkpoint.json").stat().st_size < 50_000
