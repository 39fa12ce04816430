"""The command line's own promises; what the subcommands do is tested where it is done."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from evalmode import cli
from evalmode.export.release import Released
from evalmode.model.checkpoint import Checkpoint
from evalmode.model.config import TrainConfig
from evalmode.service.settings import Settings

COMMANDS = ("train", "export", "verify", "serve", "predict", "show")


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("evalmode"), *arguments], capture_output=True, text=True, check=False, cwd=cwd
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    shown = run(command, "--help")
    assert shown.returncode == 0
    assert "Example" in shown.stdout
    assert f"evalmode {command}" in shown.stdout


def test_the_flags_of_train_are_the_fields_of_its_configuration_with_the_same_defaults() -> None:
    flags = {name: flag.default for name, flag in inspect.signature(cli.train).parameters.items()}
    assert [flags.pop(name) for name in ("out", "resume", "cache")] == [None, False, None]
    fields = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    fine_tuning = fields.keys() - flags.keys()
    assert flags == {name: default for name, default in fields.items() if name not in fine_tuning}
    assert fine_tuning == {"informed_table", "warmup_steps", "clip_norm", "save_steps"}


def test_the_flags_of_serve_are_settings() -> None:
    assert inspect.signature(cli.serve).parameters.keys() <= Settings.model_fields.keys()


def test_nonsense_is_one_sentence_with_the_flag_and_the_value(tmp_path: Path) -> None:
    refused = run("train", "--heads", "5", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == "evalmode: heads must be a divisor of width=96, got heads=5\n"


def test_predict_without_a_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    refused = run("predict", "x", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("evalmode: no bundle at bundles: make one with")
    assert "Traceback" not in refused.stderr


def test_verify_tells_pass_from_findings_from_unreadable(released: Released, tmp_path: Path) -> None:
    torn = tmp_path / "torn.onnx"
    torn.write_bytes((released.path / "model.onnx").read_bytes()[:1000])
    assert run("verify", str(released.path / "model.onnx"), str(released.path)).returncode == 0
    unreadable = run("verify", str(torn), str(tmp_path / "absent.onnx"))
    assert unreadable.returncode == 2
    assert "torn.onnx" in unreadable.stderr
    assert "absent.onnx" in unreadable.stderr


def test_verify_finds_a_dropout_that_trains(released: Released, tmp_path: Path) -> None:
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(released.path / "model.onnx")
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(True), "on"))
    last = model.graph.node[-1]
    last.output[0], out = "before", last.output[0]
    model.graph.node.append(helper.make_node("Dropout", ["before", "", "on"], [out], name="leak"))
    onnx.save(model, tmp_path / "leak.onnx")
    found = run("verify", str(tmp_path / "leak.onnx"))
    assert found.returncode == 1
    assert "leak (Dropout-20)" in found.stdout


def test_show_prints_manifest_certificate_census_and_metrics(released: Released) -> None:
    shown = run("show", str(released.path)).stdout
    for part in (
        "manifest",
        "certificate: pass",
        "census",
        "metrics",
        "embedding.dropout",
        released.certificate.digest[:16],
    ):
        assert part in shown


def test_export_refuses_a_leak_names_the_site_and_writes_nothing(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AlwaysOn(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(x, 0.25)

    checkpoint.module.blocks[1].feed_forward.dropout = AlwaysOn()
    monkeypatch.setattr("evalmode.model.checkpoint.load", lambda path: checkpoint)
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["export", "any", "--out", str(tmp_path)])
    assert shown.exit_code == 1
    assert "blocks.1.feed_forward.dropout (AlwaysOn, p=0.25): dropout" in shown.output
    assert list(tmp_path.iterdir()) == []
