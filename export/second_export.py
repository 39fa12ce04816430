"""A second export of the user's module, in another process under other seeds.

The seeds differ from the first import on, also those that the user's code sets. So random data that
is neither a parameter nor a buffer differs, and changes the fingerprint. Examples are a mask drawn
at import and a table that a constructor fills. Parameters and buffers are copied from the first
process.

The other process runs `python -m evalmode.export.second_export FACTORY FOLDER`. It reads a task
from the folder and writes a fingerprint into it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

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

_TASK_FILE, _RESULT_FILE = "task.pt", "fingerprint.json"
_SEED = 2


class TwinFailed(EvalmodeError):  # noqa: N818 - read as a sentence: "raise TwinFailed"
    """The module could not be exported a second time; the message is from the other process."""


@contextmanager
def exported_elsewhere(candidate: Candidate, factory: str) -> Iterator[Twin]:
    """Start the other process at once. Calling the twin waits for its fingerprint; leaving the
    context ends the process.

    A factory that starts from random parameters returns the same network nevertheless: parameters
    and buffers are passed on. The twin raises TwinFailed if the other process fails.
    """
    weights = _weights_of(Network.of(candidate.module))
    task = {
        "weights": {path: tensor.detach() for path, tensor in weights.items()},
        "constants": dict(candidate.constants),
        "example": dict(candidate.example),
        "dynamic_axes": {
            name: dict(axes) for name, axes in candidate.evidence.dynamic_axes.items()
        },
        "outputs": list(candidate.outputs),
    }
    with TemporaryDirectory(prefix="evalmode-") as name:
        folder = Path(name)
        torch.save(task, folder / _TASK_FILE)
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

            def twin() -> Fingerprint:
                _, errors = process.communicate()
                if process.returncode:
                    lines = errors.strip().splitlines()
                    # The last line of a traceback has the error's own message.
                    reason = f"the other process ended with {process.returncode}"
                    raise TwinFailed(lines[-1] if lines else reason)
                return Fingerprint.model_validate_json((folder / _RESULT_FILE).read_bytes())

            try:
                yield twin
            finally:
                process.kill()


def _weights_of(network: Network) -> dict[str, Tensor]:
    """All parameters and buffers by their paths.

    Unlike in a `state_dict`, those of modules in plain Python containers and non-persistent buffers
    are included.
    """
    weights: dict[str, Tensor] = {}
    for path, part in network.parts.items():
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                weights[f"{path}.{name}"] = tensor
    return weights


def main(factory: str, folder: Path) -> None:
    """The other process: export the factory's module under other seeds, with the weights and the
    example of the task in the folder.
    """
    task = torch.load(folder / _TASK_FILE, weights_only=True)
    seed_everything(_SEED)
    with other_seeds():
        module = load_in_eval_mode(factory)
        weights = _weights_of(Network.of(module))
        unmatched = sorted(weights.keys() ^ task["weights"].keys())
        if unmatched:
            raise TwinFailed(f"the factory's second network has other weights: {unmatched[0]}")
        with torch.no_grad():
            for path, tensor in task["weights"].items():
                if tensor.shape != weights[path].shape:
                    raise TwinFailed(
                        f"{path} is {list(weights[path].shape)} in the factory's second network and"
                        f" {list(tensor.shape)} in its first"
                    )
                weights[path].copy_(tensor)
        bind_constants(module, task["constants"])
        # As in the first process, a forward runs before the export, and a copy of the module from
        # before that forward is traced. So what the first forward creates outside of the module
        # exists already, and what it creates in the module is created again in the trace.
        network = Network.of(module)
        with untouched(network):
            traced = network.copy().module
            with plain_forward():
                module(**copies_of(task["example"]))
            converted = convert(
                traced, task["example"], dynamic_axes=task["dynamic_axes"], outputs=task["outputs"]
            )
    (folder / _RESULT_FILE).write_text(fingerprint(converted.model).model_dump_json())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
