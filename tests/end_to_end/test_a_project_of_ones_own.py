"""Someone's project, with packages that are called as ours are, goes the whole way by the real
command.
"""

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
    """A folder whose packages `model`, `export`, `service` and `bundle` are the user's."""
    folder = tmp_path_factory.mktemp("theirs")
    files = {
        "model/net.py": NET,
        "service/scale.py": "SCALE = 2.0\n",
        "export/__init__.py": "NAME = 'theirs'\n",
    }
    for name in ("model/__init__.py", "service/__init__.py", "bundle/__init__.py"):
        files[name] = (
            ""
            if name != "bundle/__init__.py"
            else "raise RuntimeError('theirs, and not asked for')\n"
        )
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def called(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
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
    made = called(
        project, "export", "model.net:build", "--inputs", "model.net:inputs", "--name", "theirs"
    )
    assert made.returncode == 0, made.stderr
    assert "digest " in made.stdout
    return project / "bundles/theirs/1"


def test_the_users_packages_win_and_his_module_becomes_a_bundle_that_verifies(
    exported: Path, project: Path
) -> None:
    found = called(project, "verify", "bundles", "--format", "json")
    assert found.returncode == 0, found.stdout
    (file,) = json.loads(found.stdout)["files"]
    assert (file["path"], file["verdict"], file["findings"]) == ("bundles/theirs/1", "pass", [])
    assert {rule["rule"] for rule in file["certified"]} >= {
        "parity",
        "baked-noise",
        "batch-invariance",
        "escaped-module",
    }


def test_what_leaks_is_refused_with_its_line_and_leaves_nothing(project: Path) -> None:
    refused = called(
        project, "export", "model.net:leaks", "--inputs", "model.net:inputs", "--out", "leaky"
    )
    assert refused.returncode == 1
    assert "eager-randomness" in refused.stdout
    assert "net.py:13" in refused.stdout.replace("\n", "")
    assert [*project.glob("leaky/*")] == []


def test_a_bundle_without_a_front_end_is_served_no_texts_and_says_so(
    exported: Path, project: Path
) -> None:
    refused = called(project, "predict", "a text", "--bundle", str(exported))
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("factory", "code", "kind"), [("build", 0, "inverted"), ("unscaled", 1, "unscaled")]
)
def test_the_audit_tells_the_scale_that_is_kept_from_the_one_that_is_lost(
    project: Path, factory: str, code: int, kind: str
) -> None:
    found = called(project, "audit", f"model.net:{factory}", "--inputs", "model.net:inputs")
    assert found.returncode == code, found.stderr
    assert f"│ {kind}" in found.stdout
    if code:
        assert re.search(r"(1\.9|2)\S* times larger in eval than in training", found.stdout)


def test_the_audits_report_points_to_the_users_file(project: Path) -> None:
    arguments = ("audit", "model.net:unscaled", "--inputs", "model.net:inputs", "--samples", "200")
    assert (
        called(project, *arguments, "--format", "sarif", "--output", "audit.sarif").returncode == 1
    )
    (run,) = json.loads((project / "audit.sarif").read_text())["runs"]
    (result,) = run["results"]
    assert result["ruleId"] == "expectation-gap"
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "model/net.py"


@pytest.mark.parametrize(
    ("arguments", "said"),
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
def test_what_cannot_be_used_is_one_sentence_and_exit_code_2(
    project: Path, exported: Path, arguments: tuple[str, ...], said: str
) -> None:
    refused = called(project, *arguments)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"evalmode: {said}")
    assert refused.stderr.count("\n") == 1


def test_a_bare_file_is_run_on_given_inputs_and_compared_with_its_module(
    project: Path, exported: Path
) -> None:
    file = str(exported / "model.onnx")
    np.savez(
        project / "rows.npz", x=np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    )
    for inputs, module, ran in (
        ("rows.npz", None, {"repeatability", "non-finite", "batch-invariance"}),
        ("made", None, {"repeatability", "non-finite", "batch-invariance"}),
        ("rows.npz", "model.net:build", {"repeatability", "parity", "dynamic-axes"}),
    ):
        more = () if module is None else ("--module", module)
        found = called(project, "verify", file, "--inputs", inputs, *more, "--format", "json")
        (report,) = json.loads(found.stdout)["files"]
        verdicts = {rule["rule"]: rule["verdict"] for rule in report["rules"]}
        assert ran <= {rule for rule, verdict in verdicts.items() if verdict in ("pass", "fail")}
        # A factory that does not load the trained weights makes another module, and parity must say
        # so.
        assert (found.returncode, verdicts["parity"]) == (
            (0, "not applicable") if module is None else (1, "fail")
        )
