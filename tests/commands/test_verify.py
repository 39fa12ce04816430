"""`evalmode verify --inputs`: unreadable inputs are one sentence and exit code 2, no finding."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.export.verify.unrunnable import aborts, hangs

EVALMODE = Path(sys.executable).with_name("evalmode")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    opsets = [helper.make_opsetid("", 20)]
    path = tmp_path / "model.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    )
    return path


def verify(model: Path, inputs: str) -> subprocess.CompletedProcess[str]:
    command = [EVALMODE, "verify", model, "--inputs", inputs]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=model.parent)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"no arrays"])
def test_a_file_without_arrays_is_named(content: bytes, model: Path) -> None:
    (model.parent / "rows.npz").write_bytes(content)
    process = verify(model, "rows.npz")
    assert process.returncode == 2
    assert "rows.npz cannot be read as a .npz file of arrays" in process.stderr
    assert "Aborted" not in process.stderr


def test_an_eof_error_in_the_users_code_is_no_finding(model: Path) -> None:
    (model.parent / "users.py").write_text(
        "import pickle\nROWS = pickle.load(open('empty', 'rb'))\n"
    )
    (model.parent / "empty").write_bytes(b"")
    process = verify(model, "users:ROWS")
    assert process.returncode == 2
    assert "EOFError" in process.stderr


def test_the_arrays_of_an_npz_file_are_the_inputs(model: Path) -> None:
    np.savez(model.parent / "rows.npz", x=np.ones(2, np.float32))
    assert verify(model, "rows.npz").returncode == 0


def test_a_file_that_aborts_or_hangs_the_runtime_has_a_verdict_like_the_others(model: Path) -> None:
    aborts(model.with_name("aborts.onnx"))
    hangs(model.with_name("hangs.onnx"))
    flags = ["--inputs", "made", "--time-limit", "2", "--format", "json", "--output", "out.json"]
    process = subprocess.run(
        [EVALMODE, "verify", ".", *flags],
        capture_output=True,
        text=True,
        check=False,
        cwd=model.parent,
    )
    assert process.returncode == 1, process.stderr
    report = json.loads((model.parent / "out.json").read_text())
    verdicts = {entry["path"]: entry["verdict"] for entry in report["files"]}
    assert verdicts == {"aborts.onnx": "fail", "hangs.onnx": "unproven", "model.onnx": "pass"}


@pytest.mark.parametrize(
    ("flag", "value"), [("--time-limit", "0"), ("--time-limit", "nan"), ("--memory-limit", "-1")]
)
def test_an_invalid_limit_is_refused(flag: str, value: str, model: Path) -> None:
    process = subprocess.run(
        [EVALMODE, "verify", model, flag, value], capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    name = flag.strip("-").replace("-", "_")
    assert f"{name} must be" in process.stderr


def test_an_interrupt_ends_a_run_that_hangs_at_once(model: Path) -> None:
    command = [EVALMODE, "verify", hangs(model.with_name("hangs.onnx")), "--inputs", "made"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as process:
        time.sleep(6)  # until the file runs
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert process.wait(20) != 0
        assert time.monotonic() - started < 10
