"""What a run leaves on disk while it trains, so that kill -9 at any instant costs it a few steps
and not one bit.

The state is one file, replaced whole: temp + fsync + rename. Beside it stands the run's
configuration, and another run does not continue from it. Knows nothing of what the state means.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.io import CheckpointIO

from evalmode.atomic_files import draft_of, settle, write_file
from evalmode.errors import EvalmodeError

FOLDER, STATE_FILE, RUN_FILE = "training", "state.ckpt", "run.json"


class RunMismatch(EvalmodeError):  # noqa: N818 - read as a sentence
    """A run was asked to continue another one that was configured otherwise; the message names what
    differs.
    """


class WholeFiles(CheckpointIO):
    """Lightning's way to the disk, replaced: its own neither flushes nor replaces in one
    instant.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write the state whole."""
        torch.save(checkpoint, draft_of(Path(path)))
        settle(Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read it back: tensors and plain values, no code."""
        return torch.load(path, map_location=map_location, weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove it."""
        Path(path).unlink(missing_ok=True)


class KeepState(lightning.Callback):
    """Saves every `steps` steps and at the end of each epoch; must come after the callbacks whose
    state it keeps.
    """

    def __init__(self, path: Path, *, steps: int) -> None:
        self.path, self.steps = path, steps

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Save in the middle of an epoch; its last step is left to the epoch's end, which comes
        with a validation.
        """
        if trainer.global_step % self.steps == 0 and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Save what the epoch has come to."""
        trainer.save_checkpoint(self.path)


def open_run(folder: Path, *, record: dict[str, Any], resume: bool) -> None:
    """Make `folder` this run's own; a state that the run continues from stays in it.

    Raises RunMismatch when the state there is another run's, and EvalmodeError when it would be
    lost: it is there, and `resume` is not asked for.
    """
    state, run = folder / STATE_FILE, folder / RUN_FILE
    if state.exists() and not resume:
        raise EvalmodeError(
            f"{folder.parent} holds an unfinished training: go on with --resume, or choose another"
            " --out"
        )
    if state.exists():
        require_same(json.loads(run.read_text()), record, where=run)
        return
    shutil.rmtree(folder, ignore_errors=True)
    try:
        write_file(run, json.dumps(record, indent=1, sort_keys=True).encode())
    except OSError as error:
        raise EvalmodeError(
            f"no training can be written to {folder.parent}: {error.strerror}"
        ) from error


def require_same(stored: dict[str, Any], record: dict[str, Any], *, where: Path) -> None:
    """Raise RunMismatch, naming what differs, unless a run described by `record` may continue or
    stand for `stored`.
    """
    differing = [
        f"{key} was {stored.get(key)!r} and is now {record.get(key)!r}"
        for key in sorted(stored.keys() | record.keys())
        if stored.get(key) != record.get(key)
    ]
    if differing:
        raise RunMismatch(
            f"{where} describes another training: {'; '.join(differing)}: use the same options, or"
            " another --out"
        )
