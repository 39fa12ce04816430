"""A second export of the user's module in a process of its own, where other seeds hold from the
first import on, those that the user's code gives included.

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
from torch import Tensor

from evalmode.errors import EvalmodeError
from evalmode.export.convert import convert
from evalmode.export.fingerprint import Fingerprint, fingerprint
from evalmode.export.inputs.candidate import Candidate, Twin
from evalmode.export.inputs.references import load_in_eval_mode
from evalmode.export.inputs.samples import bind_constants
from evalmode.export.module.forward import copies_of, plain_forward, seed_everything
from evalmode.export.module.network import Network
from evalmode.export.module.other_seeds import other_seeds
from evalmode.export.module.untouched import untouched

_TASK, _ANSWER = "task.pt", "fingerprint.json"
_SEED = 2


class TwinFailed(EvalmodeError):  # noqa: N818 - read as a sentence: "raise TwinFailed"
    """The module could not be made and exported a second time; the message is the other
    process's.
    """


@contextmanager
def exported_elsewhere(candidate: Candidate, factory: str) -> Iterator[Twin]:
    """Start the other process at once; the twin waits for it, and leaving ends it.

    Parameters and buffers are handed over: a factory that starts from random ones gives the same
    network nevertheless.
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
        "weights": {
            path: tensor.detach() for path, tensor in _weights(Network.of(candidate.module)).items()
        },
        "constants": dict(candidate.constants),
        "example": dict(candidate.example),
        "dynamic_axes": {
            name: dict(axes) for name, axes in candidate.evidence.dynamic_axes.items()
        },
        "outputs": list(candidate.outputs),
    }


def _weights(network: Network) -> dict[str, Tensor]:
    """Every parameter and buffer by its path: those of hidden modules, and those that no state_dict
    holds, too.
    """
    weights: dict[str, Tensor] = {}
    for path, part in network.parts.items():
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                weights[f"{path}.{name}"] = tensor
    return weights


def _fingerprint_of(process: subprocess.Popen[str], folder: Path) -> Fingerprint:
    _, errors = process.communicate()
    if process.returncode:
        lines = errors.strip().splitlines()
        raise TwinFailed(
            lines[-1] if lines else f"the other process ended with {process.returncode}"
        )
    return Fingerprint.model_validate_json((folder / _ANSWER).read_bytes())


def main(factory: str, folder: Path) -> None:
    """Export what the factory returns under other seeds, with the weights and on the example that
    lie in the folder.
    """
    task = torch.load(folder / _TASK, weights_only=True)
    seed_everything(_SEED)
    with other_seeds():
        module = load_in_eval_mode(factory)
        weights = _weights(Network.of(module))
        if weights.keys() != task["weights"].keys():
            strange = sorted(weights.keys() ^ task["weights"].keys())
            raise TwinFailed(f"the factory's second network has other weights: {strange[0]}")
        with torch.no_grad():
            for path, tensor in task["weights"].items():
                if tensor.shape != weights[path].shape:
                    raise TwinFailed(
                        f"{path} is {list(weights[path].shape)} in the factory's second network and"
                        f" {list(tensor.shape)} in its first"
                    )
                weights[path].copy_(tensor)
        bind_constants(module, task["constants"])
        # What is made beside the module in the first forward is there, as it is in the first
        # process; on the copy that is traced it is made in the trace, as it is there.
        network = Network.of(module)
        with untouched(network):
            traced = network.copy().module
            with plain_forward():
                module(**copies_of(task["example"]))
            converted = convert(
                traced, task["example"], dynamic_axes=task["dynamic_axes"], outputs=task["outputs"]
            )
    (folder / _ANSWER).write_text(fingerprint(converted.model).model_dump_json())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
