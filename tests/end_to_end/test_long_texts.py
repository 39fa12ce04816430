"""A training with one text of megabytes costs little more than one with short texts only."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

EVALMODE = Path(sys.executable).parent / "evalmode"
SMALL = ["--epochs", "1", "--width", "16", "--layers", "1", "--heads", "2"]
# Texts of 20 MB: a unit, and how often it is repeated.
LONG = {
    "words": ("some words and more ", 1_000_000),
    "one word": ("x", 20_000_000),
    "quotation marks": ('"', 10_000_000),
    "combining marks": ("\u0301\u0316", 5_000_000),
    "emoji": ("some words and more \U0001f600 ", 800_000),
}
# A small process runs the training: the peak memory of a child starts at that of its parent.
MEASURE = """
import os, sys
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def write(path: Path, text: str) -> None:
    """Write 60 rows, one of which has the text."""
    texts = [f"sentence {number} is {'fine' if number % 2 else 'poor'}" for number in range(60)]
    texts[5] = text
    rows = [(text, "pos" if number % 2 else "neg") for number, text in enumerate(texts)]
    if path.suffix == ".jsonl":
        dicts = [{"text": text, "label": label} for text, label in rows]
        lines = [json.dumps(row, ensure_ascii=False) for row in dicts]
        path.write_text("\n".join(lines))
    elif path.suffix == ".parquet":
        columns = dict(zip(("text", "label"), map(list, zip(*rows, strict=True)), strict=True))
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        with path.open("w", newline="") as file:
            separator = "\t" if path.suffix == ".tsv" else ","
            csv.writer(file, delimiter=separator).writerows([("text", "label"), *rows])


def cost(path: Path) -> tuple[float, float]:
    """The CPU seconds and the peak memory in MB of a training with a file."""
    train = [EVALMODE, "train", "--data", path, "--out", path.with_suffix(""), *SMALL]
    command = [sys.executable, "-S", "-c", MEASURE, *train]
    process = subprocess.run(command, capture_output=True, check=False, text=True)
    assert process.returncode == 0, process.stderr
    seconds, megabytes = map(float, process.stderr.split()[-2:])
    return seconds, megabytes


@pytest.mark.parametrize(
    ("format", "kinds"),
    [
        ("csv", ("words", "quotation marks", "emoji")),
        ("tsv", ("one word", "combining marks")),
        ("jsonl", ("words", "combining marks", "emoji")),
        ("parquet", ("words", "combining marks")),
    ],
)
def test_one_long_text_costs_neither_time_nor_memory(tmp_path, format, kinds):
    write(tmp_path / f"short.{format}", "a short text")
    short_s, short_mb = cost(tmp_path / f"short.{format}")
    for kind in kinds:
        path = tmp_path / f"{kind}.{format}"
        unit, count = LONG[kind]
        write(path, unit * count)
        long_s, long_mb = cost(path)
        # A tokenizer that read all of the text took 10 times the memory for words. A reader that
        # held the file beside the value took 1.3 times for quotation marks and for emoji.
        assert long_mb < 1.2 * short_mb, kind
        assert long_s < 2 * short_s, kind
        assert (path.with_suffix("") / "checkpoint.json").stat().st_size < 50_000
