"""A folder with a bundle and a file for each verdict, and `evalmode verify` as a process in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evalmode.export.release import Released

HOSTILE = "a/[/red]::error::,%\n\x1b[2J drop"
LEAK, DRAW, TORN = "models/deep/leak.onnx", "models/été [/red], 50%2C.onnx", "models/torn.onnx"
CLEAN, UNDECIDED, BUNDLE = "models/clean.onnx", "models/undecided.onnx", "bundles/small/1"
VERDICTS = {
    BUNDLE: "pass",
    CLEAN: "pass",
    LEAK: "fail",
    TORN: "unreadable",
    UNDECIDED: "unproven",
    DRAW: "fail",
}


def model(*nodes: onnx.NodeProto, inputs: tuple[onnx.ValueInfoProto, ...] = ()) -> bytes:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    on = numpy_helper.from_array(np.asarray(True), "on")
    graph = helper.make_graph(nodes, "g", [values[0], *inputs], values[1:], [on])
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()
    )


@pytest.fixture(scope="session")
def tree(released: Released, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    mode = helper.make_tensor_value_info("mode", TensorProto.BOOL, [])
    contents = {
        CLEAN: model(helper.make_node("Relu", ["x"], ["y"])),
        LEAK: model(helper.make_node("Dropout", ["x", "", "on"], ["y"], name=HOSTILE)),
        DRAW: model(
            helper.make_node("Bernoulli", ["x"], ["h"], name="one"),
            helper.make_node("Bernoulli", ["h"], ["y"], name="one"),
        ),
        UNDECIDED: model(helper.make_node("Dropout", ["x", "", "mode"], ["y"]), inputs=(mode,)),
        # The start of a valid file.
        TORN: model(helper.make_node("Relu", ["x"], ["y"]))[:20],
    }
    for name, data in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    shutil.copytree(released.path, root / BUNDLE)
    (root / "empty").mkdir()
    return root


def run(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    program = [Path(sys.executable).with_name("evalmode"), "verify", *arguments]
    return subprocess.run(
        program, capture_output=True, check=False, cwd=tree, env={**os.environ, **environment}
    )


def as_json(tree: Path, *arguments: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(run(tree, *arguments, "--format", "json").stdout)
    return report
