"""`evalmode compare`, as a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.bundles import make_bundle, tiny_model

EVALMODE = str(Path(sys.executable).with_name("evalmode"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose bits depend on the batch."""
    return make_bundle(tmp_path_factory.mktemp("bundles"), model=tiny_model(batchable=False))


def compare(bundle: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [EVALMODE, "compare", str(bundle), "--rows", "40", *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_it_prints_a_line_per_setting(bundle: Path) -> None:
    process = compare(bundle)
    assert process.returncode == 0, process.stderr
    lines = {
        line.split("│")[1].strip(): line for line in process.stdout.splitlines() if "│" in line
    }
    assert "0 of 40" in lines["a second run"]
    assert "40 of 40" not in lines["2 threads"]
    assert "batches of 32" in lines
    assert "rounding toward zero" in lines


def test_json_has_the_figures_of_every_setting(bundle: Path) -> None:
    process = compare(bundle, "--json")
    assert process.returncode == 0, process.stderr
    document = json.loads(process.stdout)
    assert document["bundle"] == str(bundle)
    assert len(document["digest"]) == 64
    by_batch = {
        comparison["setting"]["batch_rows"]: comparison["differing"]
        for comparison in document["comparisons"]
        if comparison["setting"]["padding"] == "ladder"
    }
    assert by_batch[32] > 0


def test_other_bits_are_findings_where_the_same_are_required(bundle: Path) -> None:
    assert compare(bundle, "--require-same").returncode == 1


def test_a_missing_provider_is_refused_after_the_table(bundle: Path) -> None:
    process = compare(bundle, "--provider", "nonsense")
    assert process.returncode == 2
    assert "provider 'nonsense' is not available here" in process.stderr
    assert "a second run" in process.stdout


def test_texts_are_read_as_predict_reads_them(bundle: Path, tmp_path: Path) -> None:
    lines = b'\xef\xbb\xbf"one"\n\n{"text": "two", "id": 7}\n'
    for name, content, count in (
        ("texts.txt", b"one\n\nthree\n", 3),
        ("texts.jsonl", lines, 2),
        ("texts.log", lines, 2),
        ("texts", lines, 2),
    ):
        (tmp_path / name).write_bytes(content)
        process = compare(bundle, "--texts", str(tmp_path / name), "--json")
        assert process.returncode == 0, process.stderr
        assert json.loads(process.stdout)["comparisons"][0]["rows"] == count


def test_texts_come_from_stdin_and_no_more_than_the_rows(bundle: Path) -> None:
    process = subprocess.run(
        [EVALMODE, "compare", str(bundle), "--rows=2", "--texts=-", "--json"],
        input='"one"\n"two"\nnothing\n',
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["comparisons"][0]["rows"] == 2


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('"one"\n{\n', "text 2 cannot be read: the line is not valid JSON"),
        ('\n{"words": "one"}\n', "text 1 cannot be read: words is not a field of a line"),
        ("\n", "has no texts"),
    ],
)
def test_a_line_that_is_no_text_is_named(
    bundle: Path, tmp_path: Path, content: str, sentence: str
) -> None:
    (tmp_path / "texts.jsonl").write_text(content)
    process = compare(bundle, "--texts", str(tmp_path / "texts.jsonl"))
    assert process.returncode == 2
    assert sentence in " ".join(process.stderr.split())


def test_a_file_that_is_missing_is_named(bundle: Path, tmp_path: Path) -> None:
    process = compare(bundle, "--texts", str(tmp_path / "nothing.txt"))
    assert process.returncode == 2
    assert "--texts" in process.stderr
    assert "nothing.txt cannot be read: No such file" in process.stderr
