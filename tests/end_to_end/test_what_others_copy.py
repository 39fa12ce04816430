"""The commands in the workflow and the hook that other projects copy are run here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from onnx import TensorProto, helper

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        shlex.split(command),
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_every_command_of_the_export_job_succeeds_on_the_example(tmp_path: Path) -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/export-checks.yml").read_text())
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    steps = [step["run"] for step in workflow["jobs"]["export"]["steps"] if "run" in step]
    commands = [step for step in steps if step.startswith("evalmode ")]
    assert [command.split()[1] for command in commands] == ["export", "audit", "verify"]
    for command in commands:
        process = run(command, tmp_path)
        assert process.returncode == 0, (command, process.stdout, process.stderr)
    uploads = [
        step["with"]
        for step in workflow["jobs"]["export"]["steps"]
        if "upload-sarif" in step.get("uses", "")
    ]
    (sarif_run,) = json.loads((tmp_path / uploads[0]["sarif_file"]).read_text())["runs"]
    assert sarif_run["invocations"][0]["executionSuccessful"]


@pytest.fixture
def hook() -> dict[str, Any]:
    (definition,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    return dict(definition)


@pytest.mark.parametrize(("op", "code"), [("Relu", 0), ("Bernoulli", 1)])
def test_the_hook_verifies_its_files(
    hook: dict[str, Any], op: str, code: int, tmp_path: Path
) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph), tmp_path / "any.onnx")
    assert re.search(hook["files"], "models/any.onnx")
    assert run(f"{hook['entry']} any.onnx", tmp_path).returncode == code


def test_the_hook_needs_no_torch(hook: dict[str, Any], tmp_path: Path) -> None:
    """The hook may load only evalmode and the dependencies that pre-commit installs for it."""
    (tmp_path / "empty.onnx").write_bytes(b"")
    program = (
        "import sys; sys.modules.update(torch=None, scipy=None, onnxscript=None)\n"
        f"sys.argv = {[*hook['entry'].split(), 'empty.onnx']}\n"
        "from evalmode.cli import main; main()"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    assert process.stderr == "evalmode: empty.onnx is not an ONNX model: it is empty\n"
    assert [name.partition(">")[0] for name in hook["additional_dependencies"]] == [
        "onnx",
        "onnxruntime",
    ]
