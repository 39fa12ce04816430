"""A second export of the user's module in a process of its own, where other seeds hold from the
first import on.

What is random and neither a parameter nor a buffer (a mask made at import, a table filled by a
constructor) is then another one, and shows in the fingerprint. Run as `python -m
evalmode.export.second_export FACTORY FOLDER`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from evalmode.errors import EvalmodeError
from evalmode.export.convert import convert
from evalmode.export.fingerprint import Fingerprint, fingerprint
from evalmode.export.inputs.candidate import Candidate, Twin
from evalmode.export.inputs.references import load_in_eval_mode
from evalmode.export.inputs.samples import bind
from evalmode.export.module.forward import seed_everything

_TASK, _ANSWER = "task.pt", "fingerprint.json"
_SEED = 2


class TwinFailed(EvalmodeError):  # noqa: N818 - read as a sentence: "raise TwinFailed"
    """The module could not be made and exported a second time; the message is the other
    process's.
    """


@contextmanager
def exported_elsewhere(candidate: Candidate, factory: str) -> Iterator[Twin]:
    """Start the other process at once; the twin waits for it, and leaving ends it.

    The weights are handed over: a factory that starts from random ones gives the same network
    nevertheless.
    """
    with TemporaryDirectory(prefix="evalmode-") as name:
        folder = Path(name)
        torch.save(_task(candidate), folder / _TASK)
        command = [sys.executable, "-m", "evalmode.export.second_export", factory, str(folder)]
        environment = {**os.environ, "PYTHONHASHSEED": str(_SEED)}
        with subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            errors="replace",
        ) as process:
            try:
                yield lambda: _fingerprint_of(process, folder)
            finally:
                process.kill()


def _task(candidate: Candidate) -> dict[str, Any]:
    return {
        "state": candidate.module.state_dict(),
        "constants": dict(candidate.constants),
        "example": dict(candidate.example),
        "dynamic_axes": {
            name: dict(axes) for name, axes in candidate.evidence.dynamic_axes.items()
        },
        "outputs": list(candidate.outputs),
    }


def _fingerprint_of(process: subprocess.Popen[str], folder: Path) -> Fingerprint:
    _, said = process.communicate()
    if process.returncode:
        lines = said.strip().splitlines()
        raise TwinFailed(
            lines[-1] if lines else f"the other process ended with {process.returncode}"
        )
    return Fingerprint.model_validate_json((folder / _ANSWER).read_bytes())


def main(factory: str, folder: Path) -> None:
    """Export what the factory returns, with the weights and on the example that lie in the
    folder.
    """
    seed_everything(_SEED)
    task = torch.load(folder / _TASK, weights_only=True)
    module = load_in_eval_mode(factory)
    module.load_state_dict(task["state"])
    bind(module, task["constants"])
    converted = convert(
        module, task["example"], dynamic_axes=task["dynamic_axes"], outputs=task["outputs"]
    )
    (folder / _ANSWER).write_text(fingerprint(converted.model).model_dump_json())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
