"""README and docs are true: their commands are run, and their flags, links and paths exist.

A `console` block shows commands and their output, where `...` stands for any text. A `python` block
is run as it is. An `sh` block is not run, because its commands need a network, a container engine
or files of the reader. Its `evalmode` commands and their flags must exist.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer.main

from evalmode.cli import app

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / ".venv-clients" / "bin" / "python"
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"console", "python", "sh", "text", "yaml"}
FENCE = re.compile(r"^ *```([^\n]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
START_S = 60.0


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: Path
    language: str
    text: str

    @property
    def commands(self) -> list[tuple[str, str]]:
        """The commands of a `console` block, each with its expected output."""
        commands = []
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            commands.append((command, output))
        return commands


def blocks_of(document: Path) -> list[Block]:
    return [Block(document, *match.groups()) for match in FENCE.finditer(document.read_text())]


class Terminal:
    """Runs the blocks of documents in one folder that holds `examples/`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.environment = {
            **{name: value for name, value in os.environ.items() if "EVALMODE" not in name},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "EVALMODE_PORT": str(self.port),
            "COLUMNS": "120",
        }
        self.servers: list[subprocess.Popen[bytes]] = []

    def run(self, block: Block) -> None:
        if block.language == "console":
            for command, output in block.commands:
                self.run_command(
                    command.replace("localhost:8000", f"localhost:{self.port}"), output
                )
        elif block.language == "python":
            python = str(CLIENTS) if "tritonclient" in block.text else sys.executable
            program = block.text.replace("localhost:8000", f"localhost:{self.port}")
            self.run_command(shlex.join([python, "-c", program]), "...")

    def run_command(self, command: str, expected: str) -> None:
        if command.startswith("evalmode serve"):
            self.servers.append(
                subprocess.Popen(
                    shlex.split(command),
                    cwd=self.folder,
                    env=self.environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            self.wait_until_ready()
            return
        process = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        # A command may fail, such as `verify` of a leaky file, if the document shows its output.
        assert process.returncode == 0 or expected.strip(" .\n"), (command, process.stderr)
        printed = "\n".join(line.rstrip() for line in process.stdout.splitlines())
        pattern = re.escape(expected.strip()).replace(re.escape("..."), ".*")
        failure = (command, expected, printed, process.stderr)
        assert re.fullmatch(pattern, printed, re.DOTALL), failure

    def wait_until_ready(self) -> None:
        end = time.monotonic() + START_S
        command = ["evalmode", "healthcheck", "--url", f"http://localhost:{self.port}"]
        while subprocess.run(
            command, env=self.environment, capture_output=True, check=False
        ).returncode:
            assert time.monotonic() < end, "the server of the documentation did not become ready"


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    """A terminal in which all blocks of the README have been run, in their order."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "examples", folder / "examples")
    terminal = Terminal(folder)
    try:
        for block in blocks_of(README):
            terminal.run(block)
        yield terminal
    finally:
        for server in terminal.servers:
            server.kill()
            server.wait()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_command_prints_what_the_document_shows(terminal: Terminal, document: Path) -> None:
    # The fixture has run the commands of the README.
    if document != README:
        for block in blocks_of(document):
            terminal.run(block)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_block_names_its_language(document: Path) -> None:
    assert {block.language for block in blocks_of(document)} <= LANGUAGES


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_command_and_flag_in_a_document_exists(document: Path) -> None:
    group = typer.main.get_group(app)
    context = group.make_context("evalmode", ["show", "-"])
    text = document.read_text()
    lines = [
        line.partition("#")[0]
        for block in blocks_of(document)
        if block.language in ("sh", "console")
        for line in block.text.splitlines()
    ]
    spans = re.findall(r"`(evalmode [^`]+)`", text)
    for line in [*lines, *spans]:
        match = re.match(r"(?:\$ )?evalmode ([a-z]+)(.*)", line.strip())
        if match is None:
            continue
        _, command, _ = group.resolve_command(context, [match[1]])
        assert command is not None
        flags = {
            option
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        unknown = set(re.findall(r"(?<= )--[a-z0-9-]+", match[2])) - flags - {"--help"}
        assert not unknown, f"{document.name}: {line}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_link_and_path_exists(document: Path) -> None:
    text = FENCE.sub("", document.read_text())
    links = re.findall(r"\]\(([^)#]+)\)", text)
    targets = [document.parent / link for link in links if not link.startswith("http")]
    rooms = "bundle|model|export|service|evalmode|tests|bench|docs|examples"
    targets += [ROOT / path for path in re.findall(rf"`((?:{rooms})/[a-z0-9_/.-]+)`", text)]
    # The recipes of CONTRIBUTING.md add a rule that does not exist.
    targets = [target for target in targets if "few_nodes" not in target.name]
    missing = [str(target) for target in targets if not target.exists()]
    assert not missing


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150
