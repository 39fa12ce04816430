"""`bench/gpu.py`, on the CPU: a script for machines that have a bundle and not this project."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from evalmode.bundle.known_answers import pack, unpack
from tests.bundle.test_comparison import integer_model, integer_rows
from tests.service.bundles import tensor_bundle

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.py"
WRITTEN = ROOT / "tests" / "bundle" / "written_by" / "schema_1"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *map(str, arguments), "--seconds", "0.01"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_imports_numpy_the_runtime_and_nothing_of_ours() -> None:
    imported = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime"}


@pytest.mark.parametrize(("name", "lengths"), [("small/1", ["4", "16"]), ("classifier/1", ["8"])])
def test_on_the_cpu_a_bundle_gives_its_known_answers_and_keeps_its_rows(
    name: str, lengths: list[str]
) -> None:
    process = run(WRITTEN / name, "--provider", "cpu")
    assert process.returncode == 0, process.stderr
    report: dict[str, Any] = json.loads(process.stdout)
    assert report["bundle"] == name
    certificate = json.loads((WRITTEN / name / "certificate.json").read_bytes())
    for settings, workspace in (("deterministic", ":16:8"), ("default", None)):
        figures = report[settings]
        assert figures["CUBLAS_WORKSPACE_CONFIG"] == workspace
        known = figures["known_answers"]
        assert known["cpu_here"]["bitwise_equal"] == known["answers"] == 8
        assert known["recorded"]["largest_difference_in_deviations"] < certificate["tolerance"]
        assert list(figures["row_counts"]) == lengths
        assert figures["float_nodes_left_to_the_cpu"] == []
        for speeds in figures["rows_per_second"].values():
            assert list(speeds) == ["1", "8", "64"]
            assert all(speed > 0 for speed in speeds.values())


def test_answers_that_are_those_in_the_bundle_are_called_identical(tmp_path: Path) -> None:
    bundle = tensor_bundle(tmp_path, model=integer_model(), known_inputs=integer_rows(8))
    process = run(bundle, "--provider", "cpu", "--known-answers")
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert report["processor"]["architecture"]
    for settings in ("deterministic", "default"):
        assert report[settings]["verdict"] == "identical to the known answers"
        assert report[settings]["known_answers"]["answers"] == 8
        assert "row_counts" not in report[settings]
        assert not report[settings]["tf32"], "the CPU has none"


def test_answers_with_other_bits_are_counted_and_measured(tmp_path: Path) -> None:
    bundle = tensor_bundle(tmp_path, model=integer_model(), known_inputs=integer_rows(8))
    file = bundle / "known_answers.npz"
    answers = list(unpack(file.read_bytes()))
    for index in (2, 5, 7):
        outputs = {name: tensor.copy() for name, tensor in answers[index].outputs.items()}
        for tensor in outputs.values():
            tensor.flat[0] = np.nextafter(tensor.flat[0], np.float32(np.inf))
        answers[index] = dataclasses.replace(answers[index], outputs=outputs)
    file.write_bytes(pack(tuple(answers)))
    process = run(bundle, "--provider", "cpu", "--known-answers", "--settings", "default")
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert "deterministic" not in report
    beginning = "3 of 8 known answers have other bits, by at most "
    verdict = report["default"]["verdict"]
    assert verdict.startswith(beginning)
    assert 0 < float(verdict.removeprefix(beginning).split()[0]) < 1e-5


def test_the_row_counts_are_those_of_the_certificate_where_it_was_written_here(
    gpu: ModuleType,
) -> None:
    bundle = WRITTEN / "small/1"
    session = gpu.open_session(bundle, "cpu", "deterministic")
    rows = gpu.rows_by_length(bundle, gpu.known_answers(bundle))
    for singles in rows.values():
        counts = gpu.stable_row_counts(session, singles)
        assert counts["stable"].startswith("1"), "a row alone has its own bits"


def test_the_nodes_that_ran_on_the_cpu_are_named_by_a_profile(gpu: ModuleType) -> None:
    bundle = WRITTEN / "classifier/1"
    inputs, _ = gpu.known_answers(bundle)[0]
    nodes = gpu.float_nodes_on_cpu(bundle, "cpu", "deterministic", inputs)
    assert any(node.startswith("head/") for node in nodes)
    assert not [node for node in nodes if "(Shape)" in node], "its output holds integers"


def test_counts_are_spelled_as_spans(gpu: ModuleType) -> None:
    assert gpu.spans([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"
    assert gpu.spans([]) == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["absent"], "absent/manifest.json is not there"),
        ([WRITTEN / "small/1", "--provider", "cuda"], "provider cuda is not available here"),
    ],
)
def test_an_impossible_measurement_is_refused_in_one_sentence(
    arguments: list[object], sentence: str
) -> None:
    process = run(*arguments)
    if "cuda" in arguments and process.returncode == 0:
        pytest.skip("this machine has a GPU")
    assert process.returncode == 2
    assert sentence in process.stderr
    assert "Traceback" not in process.stderr
