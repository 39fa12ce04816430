"""`evalmode verify` on inputs that cannot be read: one sentence and exit code 2, no finding."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

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
def test_a_file_that_holds_no_arrays_is_named(content: bytes, model: Path) -> None:
    (model.parent / "rows.npz").write_bytes(content)
    process = verify(model, "rows.npz")
    assert process.returncode == 2
    assert "rows.npz cannot be read as a .npz file of arrays" in process.stderr
    assert "Aborted" not in process.stderr


def test_code_that_reads_past_the_end_of_a_file_is_no_finding(model: Path) -> None:
    (model.parent / "users.py").write_text(
        "import pickle\nROWS = pickle.load(open('empty', 'rb'))\n"
    )
    (model.parent / "empty").write_bytes(b"")
    process = verify(model, "users:ROWS")
    assert process.returncode == 2
    assert "EOFError" in process.stderr


def test_arrays_that_the_file_holds_are_read(model: Path) -> None:
    np.savez(model.parent / "rows.npz", x=np.ones(2, np.float32))
    assert verify(model, "rows.npz").returncode == 0
