"""What the Dockerfile says; building it needs a daemon and a network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from evalmode.client.readiness import DEFAULT_TIMEOUT_S

ROOT = Path(__file__).parent.parent


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile and their arguments, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    return [(name, arguments) for name, arguments in pairs]


def test_the_health_check_is_a_command_of_evalmode_that_gives_up_before_docker_does() -> None:
    (arguments,) = [arguments for name, arguments in instructions() if name == "HEALTHCHECK"]
    options, _, command = arguments.partition("CMD ")
    assert json.loads(command) == ["evalmode", "healthcheck"]
    flags = dict(option.removeprefix("--").split("=") for option in options.split())
    assert float(flags["timeout"].removesuffix("s")) > DEFAULT_TIMEOUT_S
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["evalmode"]
    assert script == "evalmode.__main__:main"  # the way that does without Typer


def test_the_image_has_the_same_default_model_as_make_serve() -> None:
    makefile = (ROOT / "Makefile").read_text()
    data = re.search(r"^DATA := (\w+)$", makefile, flags=re.MULTILINE)
    assert data is not None
    commands = [arguments for name, arguments in instructions() if "evalmode train" in arguments]
    for variable in ("TRAIN", "EXPORT"):
        command = re.search(rf"^{variable} := (.*)$", makefile, flags=re.MULTILINE)
        assert command is not None
        assert f"{command[1]} ".replace("$(DATA)", data[1]) in commands[0]


def test_the_service_is_installed_with_tracing_and_without_what_trains() -> None:
    installs = [
        re.findall(r"'\.\[(.*?)\]'", arguments)
        for name, arguments in instructions()
        if name == "RUN" and "pip install" in arguments
    ]
    extras = [set(found[0].split(",")) for found in installs]
    assert {"cpu", "train", "export"} in extras
    assert [found for found in extras if "train" not in found] == [
        {"cpu", "tracing"},
        {"gpu", "tracing"},
    ]


def test_every_variable_of_the_image_is_a_setting() -> None:
    assignments = " ".join(arguments for name, arguments in instructions() if name == "ENV")
    names = re.findall(r"\b(EVALMODE_\w+)=", assignments)
    assert "EVALMODE_PORT" in names
    program = (
        "from evalmode.service.settings import load_settings, strange_variables\n"
        "load_settings(); print(strange_variables())"
    )
    values = dict(re.findall(r"\b(EVALMODE_\w+)=(\S+)", assignments))
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env={name: text for name, text in os.environ.items() if "EVALMODE" not in name} | values,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed == "{}\n"
