"""What a run leaves on disk while it trains, so that kill -9 at any instant costs it a few steps
and not one bit.

The state is one file, replaced whole: temp + fsync + rename. It begins with the sha256 of the rest,
since torch reads a file with changed bytes without a word. The run's configuration is in it and
beside it, and another run does not continue from it. What else a state holds is in restoring.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import reprlib
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.io import CheckpointIO

from evalmode.atomic_files import write_file
from evalmode.bundle.errors import FileUnreadable
from evalmode.bundle.frontend import TOKENIZER_FILE
from evalmode.bundle.store import read_file
from evalmode.errors import EvalmodeError
from evalmode.model.checkpoint import HELD_OUT_FILE, RECORD_FILE, WEIGHTS_FILE

FOLDER, STATE_FILE, RUN_FILE = "training", "state.ckpt", "run.json"
BEGIN_ANEW = "begin anew with --overwrite, or choose another --out"
# What a state must hold to be looked at: Lightning's keys, and our own two.
KEYS = {
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "state_dict": dict,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "batches": dict,
    "run": dict,
}


class RunMismatch(EvalmodeError):  # noqa: N818 - read as a sentence
    """A run was asked to continue another one that was configured otherwise; the message names what
    differs.
    """


class StateUnusable(EvalmodeError):  # noqa: N818 - read as a sentence
    """What a killed training left cannot be gone on with; the message names the file."""


class StateNotWritten(EvalmodeError):  # noqa: N818 - read as a sentence
    """The state cannot be saved, for example without room; the one before it is still there."""


class WholeFiles(CheckpointIO):
    """Lightning's way to the disk, replaced: its own neither flushes nor replaces in one
    instant.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write the state whole, or raise StateNotWritten."""
        # In memory first: torch's own writer turns a full disk into an error without a cause.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        body = buffer.getbuffer()
        try:
            write_file(Path(path), b"".join((hashlib.sha256(body).digest(), body)))
        except OSError as error:
            raise StateNotWritten(
                f"{path} cannot be written ({error.strerror}): make room or make it writable, and"
                " go on with --resume"
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read it back: tensors and plain values, no code. Raises StateUnusable."""
        return read_state(Path(path), map_location=map_location)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove it."""
        Path(path).unlink(missing_ok=True)


class SaveState(lightning.Callback):
    """Saves every `steps` steps and at the end of each epoch, with the record of the run.

    It must come after the callbacks whose state it keeps.
    """

    def __init__(self, path: Path, *, steps: int, record: dict[str, Any]) -> None:
        self.path, self.steps, self.record = path, steps, record

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Add the record: a state that was copied from another run must be told apart."""
        checkpoint["run"] = self.record

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


def check_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise EvalmodeError unless a run may write to `out`. Costs no work, and changes nothing.

    Neither a finished nor an unfinished training is lost unless `overwrite` says so. A state to
    resume from must be whole.
    """
    if resume and overwrite:
        raise EvalmodeError(
            "--resume goes on with a training, and --overwrite begins anew: give one of them"
        )
    state, record = out / FOLDER / STATE_FILE, out / RECORD_FILE
    for folder in (out / FOLDER, out, *out.parents):
        if os.path.lexists(folder):
            if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
                reason = "may not be written to" if os.path.isdir(folder) else "is not a folder"
                raise EvalmodeError(
                    f"no training can be written to {out}: {folder} {reason}: choose another --out"
                )
            if folder != out / FOLDER:
                break
    for name in (RECORD_FILE, WEIGHTS_FILE, HELD_OUT_FILE, TOKENIZER_FILE):
        path = out / name
        if os.path.isdir(path) and not os.path.islink(path):
            raise EvalmodeError(
                f"no training can be written to {out}: {path} is a folder: choose another --out"
            )
    if os.path.lexists(state) and resume:
        read_state(state)
        read_record(out / FOLDER / RUN_FILE)
    elif os.path.lexists(state) and not overwrite:
        raise EvalmodeError(
            f"{out} holds an unfinished training: go on with --resume, begin anew with --overwrite,"
            " or choose another --out"
        )
    elif os.path.lexists(record) and not (resume or overwrite):
        raise EvalmodeError(
            f"{out} holds a finished training: take it as it is with --resume, write over it with"
            " --overwrite, or choose another --out"
        )


def open_run(folder: Path, *, record: dict[str, Any], resume: bool) -> None:
    """Make `folder` this run's own; a state that the run continues from stays in it.

    Raises RunMismatch when the state there is another run's, and EvalmodeError when nothing can be
    written. Without `resume` a state is lost: `check_folder` comes first.
    """
    state, run = folder / STATE_FILE, folder / RUN_FILE
    if resume and state.exists():
        require_same(read_record(run), record, where=run)
        return
    try:
        if os.path.lexists(folder):
            shutil.rmtree(folder)
        write_file(run, json.dumps(record, indent=1, sort_keys=True).encode())
    except OSError as error:
        remove_run(folder.parent)
        raise EvalmodeError(
            f"no training can be written to {folder.parent} ({error.strerror or error}):"
            " choose another --out"
        ) from error


def remove_run(out: Path) -> None:
    """Remove what an unfinished training has written to `out`, and `out` where nothing else is in
    it.
    """
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    with suppress(OSError):  # it holds other files
        out.rmdir()


def require_same(stored: dict[str, Any], record: dict[str, Any], *, where: Path) -> None:
    """Raise RunMismatch, naming what differs, unless a run described by `record` may continue or
    stand for `stored`.
    """
    differing = [
        f"{key} was {reprlib.repr(stored.get(key))} and is now {reprlib.repr(record.get(key))}"
        for key in sorted(stored.keys() | record.keys())
        if stored.get(key) != record.get(key)
    ]
    if differing:
        raise RunMismatch(
            f"{where} describes another training: {'; '.join(differing)}: use the same options, or"
            " another --out"
        )


def read_state(path: Path, *, map_location: Any = None) -> dict[str, Any]:
    """The state in a file: a dictionary with `KEYS`, of tensors and plain values.

    Raises StateUnusable for bytes that no training wrote, and for another version of Lightning.
    """
    data = _read(path)
    size = hashlib.sha256().digest_size
    if hashlib.sha256(memoryview(data)[size:]).digest() != data[:size]:
        raise StateUnusable(
            f"{path} was cut short or changed ({len(data):,} bytes, which are not what the training"
            f" wrote): {BEGIN_ANEW}"
        )
    try:
        # As Lightning's own reader: tensors come to the CPU first, wherever they were saved.
        state: object = torch.load(
            io.BytesIO(data[size:]), map_location=map_location or "cpu", weights_only=True
        )
    except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError and others
        raise StateUnusable(f"{path} is not a state that torch reads: {BEGIN_ANEW}") from error
    if not isinstance(state, dict):
        raise StateUnusable(
            f"{path} holds a {type(state).__name__} and not the state of a training: {BEGIN_ANEW}"
        )
    for key, kind in KEYS.items():
        if key not in state:
            raise StateUnusable(
                f"{path} is not the state of a training, since it lacks {key!r}: {BEGIN_ANEW}"
            )
        if not isinstance(state[key], kind):
            raise StateUnusable(
                f"{path} is not the state of a training, since {key!r} is of type"
                f" {type(state[key]).__name__} and not {kind.__name__}: {BEGIN_ANEW}"
            )
    version = state["pytorch-lightning_version"]
    if version != lightning.__version__:
        # Another version may restore it, and go on with other bits.
        raise StateUnusable(
            f"{path} is of Lightning {version[:40]!r}, and {lightning.__version__!r} is installed:"
            f" {BEGIN_ANEW}"
        )
    return state


def read_record(path: Path) -> dict[str, Any]:
    """The configuration of the run whose state is in the same folder. Raises StateUnusable."""
    try:
        record = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise StateUnusable(f"{path} is not whole JSON ({error}): {BEGIN_ANEW}") from error
    if not isinstance(record, dict):
        raise StateUnusable(f"{path} does not describe a training: {BEGIN_ANEW}")
    return record


def _read(path: Path) -> bytes:
    try:
        return read_file(path)
    except FileUnreadable as error:
        raise StateUnusable(f"{error.reason}: {BEGIN_ANEW}") from error
