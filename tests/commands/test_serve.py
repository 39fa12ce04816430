"""The flags of `evalmode serve` and `evalmode predict`, and the settings that serve prints."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evalmode import cli, terminal
from evalmode.service.cpu_quota import cpu_quota
from evalmode.service.settings import GROUPS, SECRETS, Settings, load_settings

EVALMODE = Path(sys.executable).with_name("evalmode")


def run(
    *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [EVALMODE, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
    )


def test_every_setting_except_secrets_is_a_flag_of_serve_in_its_group() -> None:
    output = CliRunner(env={"COLUMNS": "250"}).invoke(cli.app, ["serve", "--help"]).output
    for name, field in Settings.model_fields.items():
        flag = f"--{name.replace('_', '-')} "
        assert (flag in output) == (name not in SECRETS), name
        if field.annotation is bool:
            assert f"--no-{name.replace('_', '-')} " in output
    positions = [output.index(f"─ {group} ─") for group in GROUPS.values()]
    assert positions == sorted(positions)
    assert (
        output.index("─ Where it listens ─")
        < output.index("--port ")
        < output.index("─ What is accepted ─")
    )


def test_printed_settings_name_their_origin_and_are_a_file_that_sets_the_same(
    tmp_path: Path,
) -> None:
    environment = {"EVALMODE_API_KEYS": "topsecret", "EVALMODE_CORS_ORIGINS": "https://a,https://b"}
    (tmp_path / "base.toml").write_text("threads = 2\n")
    flags = (
        "--port",
        "90",
        "--no-docs",
        "--config",
        "base.toml",
        "--bundle",
        'a "b"\\c',
        "--drain-s",
        "0.5",
    )
    printed = run("serve", "--print-settings", *flags, cwd=tmp_path, environment=environment)
    assert printed.returncode == 0, printed.stderr
    assert "topsecret" not in printed.stdout
    assert '# api_keys = "..."' in printed.stdout
    assert "(from: file)" in printed.stdout
    (tmp_path / "evalmode.toml").write_text(printed.stdout)
    settings = load_settings(config=tmp_path / "evalmode.toml")
    expected = {"port": 90, "docs": False, "threads": 2, "drain_s": 0.5, "bundle": Path('a "b"\\c')}
    assert settings == Settings(**expected, cors_origins=("https://a", "https://b"))
    second = run("serve", "--print-settings", "--config", "evalmode.toml", cwd=tmp_path)
    assert load_settings(config=tmp_path / "evalmode.toml") == settings
    assert second.returncode == 0


def test_printed_settings_are_a_table_on_a_terminal(tmp_path: Path) -> None:
    reader, writer = pty.openpty()
    environment = {
        **os.environ,
        "COLUMNS": "120",
        "EVALMODE_API_KEYS": "topsecret",
        "EVALMODE_PORT": "90",
    }
    command = [EVALMODE, "serve", "--print-settings", "--threads", "3"]
    with subprocess.Popen(command, stdout=writer, cwd=tmp_path, env=environment) as printing:
        os.close(writer)
        output = b""
        with contextlib.suppress(OSError):  # the end of a pseudo-terminal on Linux
            while part := os.read(reader, 65_536):
                output += part
    os.close(reader)
    assert printing.returncode == 0
    rows = [
        line.split()
        for line in re.sub(r"\x1b\[[0-9;]*m", "", output.decode()).replace("│", " ").splitlines()
    ]
    assert ["port", "90", "environment"] in rows
    assert ["threads", "3", "flag"] in rows
    assert ["workers", str(max(1, cpu_quota() // 3)), "default"] in rows
    assert ["api_keys", "(not", "shown)", "environment"] in rows
    assert b"topsecret" not in output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("serve", "--port", "70000"),
            "setting port (--port, EVALMODE_PORT) must be less than or equal to 65535",
        ),
        (("serve", "a", "--bundle", "b"), "the bundle is given twice: a and --bundle b"),
        (
            ("serve", "--config", "absent.toml"),
            "the settings file absent.toml cannot be read: No such file",
        ),
        (("predict", "--url", "http://localhost"), "--url needs --input FILE"),
        (("predict", "--output", "a"), "--output needs --input FILE"),
        (("predict", "a", "--concurrency", "2"), "--concurrency needs --input FILE"),
        (("predict", "a", "--retries", "2"), "--retries needs --url"),
        (("predict", "a", "--model", "m"), "--model names a model of the server at --url"),
        (("predict", "--input", "-", "--api-key", "k"), "--api-key needs --url"),
        (("predict", "--input", "-", "--json"), "--json is for texts"),
        (
            ("predict", "--input", "-", "--url", "http://localhost", "--provider", "cpu"),
            "--provider is for --bundle",
        ),
        (
            ("predict", "--input", "-", "--url", "http://localhost", "--bundle", "b"),
            "--bundle runs in this process, --url uses a server: give one of them",
        ),
        (("predict", "a", "--input", "b"), "give texts as arguments or as --input b, not both"),
        (
            ("predict", "--input", "absent.jsonl"),
            "--input absent.jsonl cannot be read: No such file or directory",
        ),
        (("predict", "--input", "."), "--input . cannot be read: Is a directory"),
        (
            ("predict", "--input", "-", "--model", "m"),
            "--model names a model of the server at --url",
        ),
        (
            ("predict", "--input", "-", "--url", "localhost"),
            "--url must begin with http:// or https://, got localhost",
        ),
    ],
)
def test_unusable_flags_are_one_sentence(
    tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    refused = run(*arguments, cwd=tmp_path)
    assert refused.returncode == terminal.EXIT_UNUSABLE
    assert refused.stderr.startswith(f"evalmode: {sentence}")
    assert refused.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
