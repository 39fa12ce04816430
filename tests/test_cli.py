"""What all subcommands have in common: help, exit codes, and one sentence for an error."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from evalmode import cli, terminal
from evalmode.commands.train import train_command
from evalmode.export.release import Released
from evalmode.model.checkpoint import Checkpoint
from evalmode.model.config import TrainConfig
from tests.service.bundles import make_bundle, tiny_model

COMMANDS = ("train", "export", "verify", "serve", "healthcheck", "predict", "show")


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("evalmode"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )


def called(*arguments: str, patch: pytest.MonkeyPatch) -> int:
    """The exit code of `evalmode ARGUMENTS` in this process, whose output pytest captures."""
    patch.setattr(sys, "argv", ["evalmode", *arguments])
    patch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    return int(exit_info.value.code or 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    output = run(command, "--help")
    assert output.returncode == 0
    assert "Example" in output.stdout
    assert f"evalmode {command}" in output.stdout


def test_the_flags_of_train_are_the_fields_of_its_configuration_with_the_same_defaults() -> None:
    flags = {flag.name: flag.default for flag in train_command().params}
    assert [flags.pop(name) for name in ("out", "resume", "overwrite", "cache")] == [
        None,
        False,
        False,
        None,
    ]
    fields = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    fine_tuning = fields.keys() - flags.keys()
    assert flags == {name: default for name, default in fields.items() if name not in fine_tuning}
    assert fine_tuning == {"informed_table", "warmup_steps", "clip_norm", "save_steps"}


@pytest.mark.parametrize(
    ("command", "default"),
    [
        ("serve", "[default: 8000]"),
        ("train", "[default: runs/NAME]"),
        ("verify", "[default: stdout]"),
    ],
)
def test_help_shows_defaults_that_are_described_in_words(command: str, default: str) -> None:
    output = CliRunner(env={"COLUMNS": "250"}).invoke(cli.app, [command, "--help"])
    assert default in output.output


def test_an_invalid_value_is_one_sentence_with_the_flag_and_the_value(tmp_path: Path) -> None:
    refused = run("train", "--heads", "5", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == "evalmode: heads must be a divisor of width=96, got heads=5\n"


def test_predict_without_a_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    refused = run("predict", "x", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("evalmode: no bundle at bundles: make one with")
    assert "Traceback" not in refused.stderr


def test_verify_has_different_exit_codes_for_a_pass_and_for_unreadable_files(
    released: Released, tmp_path: Path
) -> None:
    torn = tmp_path / "torn.onnx"
    torn.write_bytes((released.path / "model.onnx").read_bytes()[:1000])
    assert run("verify", str(released.path / "model.onnx"), str(released.path)).returncode == 0
    unreadable = run("verify", str(torn), str(tmp_path / "absent.onnx"))
    assert unreadable.returncode == 2
    assert "torn.onnx" in unreadable.stderr
    assert "absent.onnx" in unreadable.stderr


def test_verify_finds_a_dropout_that_trains(released: Released, tmp_path: Path) -> None:
    model = onnx.load(released.path / "model.onnx")
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(True), "on"))
    last = model.graph.node[-1]
    last.output[0], out = "before", last.output[0]
    model.graph.node.append(helper.make_node("Dropout", ["before", "", "on"], [out], name="leak"))
    onnx.save(model, tmp_path / "leak.onnx")
    process = run("verify", str(tmp_path / "leak.onnx"))
    assert process.returncode == 1
    assert "leak (Dropout-20)" in process.stdout


def test_serve_and_predict_refuse_a_bundle_with_a_forged_certificate(
    tmp_path: Path,
) -> None:
    """Its hashes and its seal are right, but the model has a Dropout that trains."""
    model = onnx.load_from_string(tiny_model())
    model.graph.node[-1].output[0] = "sum"
    weights = {"rate": np.array(0.5, np.float32), "mode": np.array(True)}
    for name, value in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    drop = helper.make_node("Dropout", ["sum", *weights], ["logits"], name="drop")
    model.graph.node.append(drop)
    bundle = str(make_bundle(tmp_path, model=model.SerializeToString()))
    for arguments in (["serve", bundle, "--port", "0"], ["predict", "--bundle", bundle, "a text"]):
        refused = run(*arguments)
        assert refused.returncode == 2
        assert "model.onnx must not be served: the node 'drop' is Dropout" in refused.stderr


def test_show_prints_manifest_certificate_census_and_metrics(released: Released) -> None:
    output = run("show", str(released.path)).stdout
    for part in (
        "manifest",
        "certificate: pass",
        "census",
        "metrics",
        "embedding.dropout",
        released.certificate.digest[:16],
    ):
        assert part in output


def test_export_refuses_a_leak_names_the_site_and_writes_nothing(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AlwaysOn(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(x, 0.25)

    checkpoint.module.blocks[1].feed_forward.dropout = AlwaysOn()
    monkeypatch.setattr("evalmode.model.checkpoint.load", lambda path: checkpoint)
    output = CliRunner(env={"COLUMNS": "200"}).invoke(
        cli.app, ["export", "any", "--out", str(tmp_path)]
    )
    assert output.exit_code == 1
    assert "blocks.1.feed_forward.dropout (AlwaysOn, p=0.25): dropout" in output.output
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def exported(
    checkpoint: Checkpoint, released: Released, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, object]:
    """The options that the command line passes to `release_checkpoint`, which exports nothing."""
    options: dict[str, object] = {}

    def release(loaded: Checkpoint, **keywords: object) -> Released:
        options.update(keywords)
        return released

    monkeypatch.setattr("evalmode.model.checkpoint.load", lambda path: checkpoint)
    monkeypatch.setattr("evalmode.export.from_checkpoint.release_checkpoint", release)
    monkeypatch.chdir(tmp_path)
    return options


def test_export_prints_the_certificate_and_the_digest(
    exported: dict[str, object],
    released: Released,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert called("export", "any", patch=monkeypatch) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"certificate of {released.path}"[:100])
    for record in released.certificate.records:
        assert record.rule in output
    assert f"digest {released.certificate.digest}\n" in output


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("plain", "plain"),
        ("my data", "my-data"),
        ("runs/.hidden/", "hidden"),
        ("été 2026", "t-2026"),
        (".", "here"),
    ],
)
def test_the_default_name_of_a_bundle_is_the_checkpoints_folder_in_allowed_characters(
    exported: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    name: str,
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert called("export", folder, patch=monkeypatch) == 0
    assert exported["name"] == name
    assert exported["root"] == Path("bundles")


@pytest.mark.parametrize("kernels", ["float", "integer"])
def test_export_passes_the_kernels_on(
    exported: dict[str, object], monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    assert called("export", "any", "--kernels", kernels, patch=monkeypatch) == 0
    assert exported["kernels"] == kernels


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("any", "--kernels", "fast"), "--kernels must be float or integer, got 'fast'"),
        (
            ("package.module:factory", "--inputs", "package.module:inputs", "--kernels", "integer"),
            "--kernels integer is for the checkpoint of an exact network",
        ),
    ],
)
def test_kernels_that_do_not_exist_or_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    sentence: str,
) -> None:
    assert called("export", *flags, patch=monkeypatch) == terminal.EXIT_UNUSABLE
    assert capsys.readouterr().err.startswith(f"evalmode: {sentence}")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ("--name", "a/b"),
            (
                "--name must be at most 64 letters, digits, '.', '_' and '-', the first a letter or"
                " a digit, "
            ),
        ),
        (("--out", "file"), "no bundle can be written to file: "),
        (("--out", "/proc/bundles"), "no bundle can be written to /proc/bundles: "),
    ],
)
def test_an_unwritable_bundle_is_refused_before_the_export_in_one_sentence(
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, str],
    sentence: str,
) -> None:
    monkeypatch.setattr("evalmode.model.checkpoint.load", lambda path: checkpoint)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    assert called("export", "any", *flags, patch=monkeypatch) == terminal.EXIT_UNUSABLE
    output = capsys.readouterr()
    assert output.err.startswith(f"evalmode: {sentence}")
    assert output.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_torch_export_says_what_to_install(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['evalmode', 'export', 'any']\n"
        "from evalmode.cli import main; main()"
    )
    refused = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert refused.returncode == terminal.EXIT_UNUSABLE
    assert refused.stderr == "evalmode: this needs torch: pip install 'evalmode[train]'\n"


@pytest.mark.parametrize(
    ("missing", "extra"),
    [
        ("onnx.helper", "export"),
        ("pyarrow", "train"),
        ("lightning.pytorch", "train"),
        ("safetensors", "train"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str, extra: str
) -> None:
    def fails() -> None:
        raise ModuleNotFoundError(name=missing)

    monkeypatch.setattr(cli, "app", fails)
    assert called(patch=monkeypatch) == terminal.EXIT_UNUSABLE
    assert (
        capsys.readouterr().err
        == f"evalmode: this needs {missing}: pip install 'evalmode[{extra}]'\n"
    )


def test_a_missing_module_that_no_extra_installs_is_an_internal_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == terminal.EXIT_UNUSABLE
    assert (
        "internal error, ModuleNotFoundError: No module named 'nowhere'" in capsys.readouterr().err
    )


@pytest.mark.parametrize("folder", ["x[/a]", "[red]", "[bold]x"])
def test_a_path_that_looks_like_markup_is_printed_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    draw = helper.make_node("Bernoulli", ["x"], ["y"], name="[/red]draw")
    monkeypatch.chdir(tmp_path)
    file = Path(folder, "m.onnx")
    file.parent.mkdir(parents=True)
    graph = helper.make_graph([draw], "g", values[:1], values[1:])
    file.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()
    )
    assert called("verify", str(file), patch=monkeypatch) == terminal.EXIT_FINDINGS
    output = capsys.readouterr().out
    assert output.startswith(f"fail        {file}\n")
    assert "[/red]draw (Bernoulli)" in output


def test_predict_reads_one_text_per_line_of_any_bytes(released: Released) -> None:
    command = ["predict", "--json", "--bundle", str(released.path)]
    output = CliRunner().invoke(cli.app, command, input=b"caf\xe9\r\n\n\xff\xfe\n\xe6\x96\x87")
    assert output.exit_code == 0, output.output
    read = json.loads(output.stdout)["predictions"]
    arguments = CliRunner().invoke(cli.app, [*command, "caf\ufffd", "", "\ufffd\ufffd", "文"])
    assert read == json.loads(arguments.stdout)["predictions"]


def test_an_internal_error_is_one_sentence_and_shows_its_traceback_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(paths: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("evalmode.export.verify.targets.find_targets", fails)
    assert called("verify", "any.onnx", patch=monkeypatch) == terminal.EXIT_UNUSABLE
    assert capsys.readouterr().err == (
        "evalmode: internal error, ZeroDivisionError: two lines (EVALMODE_TRACEBACK=1 shows"
        " where)\n"
    )
    monkeypatch.setenv("EVALMODE_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        called("verify", "any.onnx", patch=monkeypatch)


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    graph = helper.make_graph([], "g", [], [])
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    command = [Path(sys.executable).parent / "evalmode", "verify", "m.onnx", "--format", "json"]
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(
            command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert process.returncode == terminal.EXIT_UNUSABLE
    assert process.stderr.startswith("evalmode: No space left on device")
