"""The workflow and the hook that other projects copy do what they say: their own commands are run
here.
"""

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


def ran(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        shlex.split(command),
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_every_command_of_the_workflows_export_job_succeeds_on_the_example(tmp_path: Path) -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/export-checks.yml").read_text())
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    steps = [step["run"] for step in workflow["jobs"]["export"]["steps"] if "run" in step]
    commands = [step for step in steps if step.startswith("evalmode ")]
    assert [command.split()[1] for command in commands] == ["export", "audit", "verify"]
    for command in commands:
        done = ran(command, tmp_path)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    uploads = [
        step["with"]
        for step in workflow["jobs"]["export"]["steps"]
        if "upload-sarif" in step.get("uses", "")
    ]
    (run,) = json.loads((tmp_path / uploads[0]["sarif_file"]).read_text())["runs"]
    assert run["invocations"][0]["executionSuccessful"]


@pytest.fixture
def hook() -> dict[str, Any]:
    (found,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    return dict(found)


@pytest.mark.parametrize(("op", "code"), [("Relu", 0), ("Bernoulli", 1)])
def test_the_hook_judges_the_files_that_it_is_handed(
    hook: dict[str, Any], op: str, code: int, tmp_path: Path
) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph), tmp_path / "any.onnx")
    assert re.search(hook["files"], "models/any.onnx")
    assert ran(f"{hook['entry']} any.onnx", tmp_path).returncode == code


def test_the_hook_needs_no_torch(hook: dict[str, Any], tmp_path: Path) -> None:
    """What pre-commit installs beside us is all that the hook may load."""
    (tmp_path / "empty.onnx").write_bytes(b"")
    program = (
        "import sys; sys.modules.update(torch=None, scipy=None, onnxscript=None)\n"
        f"sys.argv = {[*hook['entry'].split(), 'empty.onnx']}\n"
        "from evalmode.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "evalmode: empty.onnx is not an ONNX model: it is empty\n"
    assert [name.partition(">")[0] for name in hook["additional_dependencies"]] == [
        "onnx",
        "onnxruntime",
    ]
