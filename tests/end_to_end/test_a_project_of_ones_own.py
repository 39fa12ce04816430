"""The real command in a project of a user, whose packages have the same names as our rooms."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EVALMODE = Path(sys.executable).parent / "evalmode"

NET = """
import torch
from torch import nn
from service.scale import SCALE
from export import NAME

class Net(nn.Module):
    def __init__(self, leak=0.0):
        super().__init__()
        self.linear, self.drop, self.leak = nn.Linear(4, 3), nn.Dropout(0.25), leak

    def forward(self, x):
        return nn.functional.dropout(self.drop(self.linear(x)), self.leak) * SCALE

class Unscaled(nn.Dropout):
    def forward(self, x):
        return x * (torch.rand_like(x) >= self.p) if self.training else x

def build():
    assert NAME == "theirs"
    return Net()

def leaks():
    return Net(0.25)

def unscaled():
    net = Net()
    net.drop = Unscaled(0.5)
    return net

def inputs():
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with packages `model`, `export`, `service` and `bundle` of the user."""
    folder = tmp_path_factory.mktemp("theirs")
    files = {
        "model/net.py": NET,
        "service/scale.py": "SCALE = 2.0\n",
        "export/__init__.py": "NAME = 'theirs'\n",
        "model/__init__.py": "",
        "service/__init__.py": "",
        # No file of the project imports this package, so evalmode must not import it either.
        "bundle/__init__.py": "raise RuntimeError('the bundle package of the user')\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run_evalmode(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [EVALMODE, *arguments],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def exported(project: Path) -> Path:
    process = run_evalmode(
        project, "export", "model.net:build", "--inputs", "model.net:inputs", "--name", "theirs"
    )
    assert process.returncode == 0, process.stderr
    assert "digest " in process.stdout
    return project / "bundles/theirs/1"


def test_the_packages_of_the_user_win_and_their_module_becomes_a_verified_bundle(
    exported: Path, project: Path
) -> None:
    process = run_evalmode(project, "verify", "bundles", "--format", "json")
    assert process.returncode == 0, process.stdout
    (file,) = json.loads(process.stdout)["files"]
    assert (file["path"], file["verdict"], file["findings"]) == ("bundles/theirs/1", "pass", [])
    assert {rule["rule"] for rule in file["certified"]} >= {
        "parity",
        "baked-noise",
        "batch-invariance",
        "escaped-module",
    }


def test_a_leaking_module_is_refused_with_its_line_and_writes_nothing(project: Path) -> None:
    process = run_evalmode(
        project, "export", "model.net:leaks", "--inputs", "model.net:inputs", "--out", "leaky"
    )
    assert process.returncode == 1
    assert "eager-randomness" in process.stdout
    assert "net.py:13" in process.stdout.replace("\n", "")
    assert [*project.glob("leaky/*")] == []


def test_predict_refuses_texts_for_a_bundle_without_a_front_end(
    exported: Path, project: Path
) -> None:
    process = run_evalmode(project, "predict", "a text", "--bundle", str(exported))
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("factory", "code", "kind"), [("build", 0, "inverted"), ("unscaled", 1, "unscaled")]
)
def test_the_audit_distinguishes_scaled_from_unscaled_dropout(
    project: Path, factory: str, code: int, kind: str
) -> None:
    process = run_evalmode(project, "audit", f"model.net:{factory}", "--inputs", "model.net:inputs")
    assert process.returncode == code, process.stderr
    assert f"│ {kind}" in process.stdout
    if code:
        assert re.search(r"(1\.9|2)\S* times larger in eval than in training", process.stdout)


def test_the_report_of_the_audit_points_to_the_file_of_the_user(project: Path) -> None:
    arguments = ("audit", "model.net:unscaled", "--inputs", "model.net:inputs", "--samples", "200")
    process = run_evalmode(project, *arguments, "--format", "sarif", "--output", "audit.sarif")
    assert process.returncode == 1
    (run,) = json.loads((project / "audit.sarif").read_text())["runs"]
    (result,) = run["results"]
    assert result["ruleId"] == "expectation-gap"
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "model/net.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("export", "model.net:build"),
            "model.net:build needs --inputs package.module:sample_inputs",
        ),
        (
            ("export", "runs", "--inputs", "model.net:inputs"),
            "--inputs and --dynamic-axes are for a package.module:",
        ),
        (
            ("export", "model.net:absent", "--inputs", "model.net:inputs"),
            "model.net:absent cannot be imported",
        ),
        (
            ("audit", "model.net:build", "--inputs", "model.net:inputs", "--samples", "few"),
            "--samples must be auto or",
        ),
        (
            ("audit", "model.net:build", "--inputs", "model.net:inputs", "--alpha", "2"),
            "--alpha must lie between",
        ),
        (("verify", "bundles", "--module", "model.net:build"), "--module needs --inputs"),
        (
            ("verify", "bundles", "--inputs", "absent.npz"),
            "absent.npz cannot be read as a .npz file",
        ),
        (("verify", "bundles", "--exclude", "no-rule"), "there is no rule no-rule; the rules are"),
    ],
)
def test_an_unusable_argument_is_one_sentence_and_exit_code_2(
    project: Path, exported: Path, arguments: tuple[str, ...], message: str
) -> None:
    process = run_evalmode(project, *arguments)
    assert process.returncode == 2
    assert process.stderr.startswith(f"evalmode: {message}")
    assert process.stderr.count("\n") == 1


def test_a_bare_file_is_run_on_inputs_and_compared_with_its_module(
    project: Path, exported: Path
) -> None:
    file = str(exported / "model.onnx")
    np.savez(
        project / "rows.npz", x=np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    )
    for inputs, module, expected_rules in (
        ("rows.npz", None, {"repeatability", "non-finite", "batch-invariance"}),
        ("made", None, {"repeatability", "non-finite", "batch-invariance"}),
        ("rows.npz", "model.net:build", {"repeatability", "parity", "dynamic-axes"}),
    ):
        module_options = () if module is None else ("--module", module)
        process = run_evalmode(
            project, "verify", file, "--inputs", inputs, *module_options, "--format", "json"
        )
        (report,) = json.loads(process.stdout)["files"]
        verdicts = {rule["rule"]: rule["verdict"] for rule in report["rules"]}
        assert expected_rules <= {
            rule for rule, verdict in verdicts.items() if verdict in ("pass", "fail")
        }
        # The factory does not load the weights of the exported module, so parity must fail.
        if module is None:
            assert (process.returncode, verdicts["parity"]) == (0, "not applicable")
        else:
            assert (process.returncode, verdicts["parity"]) == (1, "fail")
