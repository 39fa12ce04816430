"""An environment of its own for each peer, below the build folder, with pinned versions.

What the peers need clashes with what this project needs, and with one another.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CONSTRAINTS = Path(__file__).with_name("constraints")


class NotInstalledError(Exception):
    """An environment could not be made. The message is the last line of the installer's output."""


def environment(name: str, requirements: Sequence[str], *, build: Path) -> Path:
    """The Python of the environment `name`, which is made first if it is not there.

    Its versions are those of `constraints/NAME.txt`. Raises NotInstalledError.
    """
    folder = build / name
    python = folder / "bin" / "python"
    constraints = CONSTRAINTS / f"{name}.txt"
    digest = hashlib.sha256(constraints.read_bytes() + repr(requirements).encode()).hexdigest()
    stamp = folder / "installed"
    if stamp.exists() and stamp.read_text() == digest:
        return python
    # pip takes a minute for each of these, uv two seconds. Its own environment is made first.
    uv = build / "uv" / "bin" / "uv"
    if not uv.exists():
        run([sys.executable, "-m", "venv", "--clear", str(build / "uv")])
        run([str(uv.with_name("python")), "-m", "pip", "install", "--quiet", "uv"])
    run([str(uv), "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)])
    install = [str(uv), "pip", "install", "--quiet", "--python", str(python)]
    run([*install, "--constraints", str(constraints), *requirements])
    stamp.write_text(digest)
    return python


def run(command: Sequence[str]) -> None:
    """Run a step of an installation. Raises NotInstalledError with the last line of its output."""
    process = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if process.returncode != 0:
        lines = [line for line in process.stdout.splitlines() if line.strip()]
        raise NotInstalledError(lines[-1] if lines else f"exit code {process.returncode}")
