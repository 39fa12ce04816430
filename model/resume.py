"""The state that a run saves while it trains, so that a killed run can resume.

A kill -9 at any moment costs at most the steps since the last save, and changes no bit of the
result.

    training/state.ckpt    the state: the sha256 of the rest of the file, then the bytes of torch
    training/run.json      the record: the options of the run, and the sha256 of its data

The state is replaced atomically. It begins with a sha256, because torch reads a file with changed
bytes without an error. The record is in the state as well, so that a state of another run is
refused. restoring.py compares the rest of a state with the training that resumes from it.
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
from evalmode.model.checkpoint import CHECKPOINT_FILE, HELD_OUT_FILE, WEIGHTS_FILE

STATE_FOLDER, STATE_FILE, RUN_FILE = "training", "state.ckpt", "run.json"
START_OVER = "start over with --overwrite, or choose another --out"
# The keys that a state must have, and the type of each value. All but the last two are Lightning's.
REQUIRED_KEYS = {
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
    """A run cannot continue another run with other options; the message names the differences."""


class StateUnusable(EvalmodeError):  # noqa: N818 - read as a sentence
    """No run can resume from this state; the message names the file."""


class StateNotWritten(EvalmodeError):  # noqa: N818 - read as a sentence
    """The state cannot be saved, for example on a full disk; the previous one is unchanged."""


class AtomicCheckpointIO(CheckpointIO):
    """Writes and reads states for Lightning.

    Lightning's own writer is not atomic, and does not flush the file to the disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write the state atomically. Raises StateNotWritten."""
        # Serialised in memory first, because torch's own writer reports a full disk without the
        # cause.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        body = buffer.getbuffer()
        try:
            write_file(Path(path), b"".join((hashlib.sha256(body).digest(), body)))
        except OSError as error:
            raise StateNotWritten(
                f"{path} cannot be written ({error.strerror}): free disk space or make it"
                " writable, then continue with --resume"
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a state: tensors and plain values, never code. Raises StateUnusable."""
        return read_state(Path(path), map_location=map_location)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a state."""
        Path(path).unlink(missing_ok=True)


class SaveState(lightning.Callback):
    """Saves the state after each `steps` steps and at the end of each epoch.

    It must be the last callback, because it saves the state of the others. `record` describes the
    run.
    """

    def __init__(self, path: Path, *, steps: int, record: dict[str, Any]) -> None:
        self.path, self.steps, self.record = path, steps, record

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Add the record, so that a state that was copied from another run is recognised."""
        checkpoint["run"] = self.record

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Save within an epoch."""
        # The last batch of an epoch is saved by `on_train_epoch_end`, after the validation.
        if trainer.global_step % self.steps == 0 and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Save after the validation of the epoch."""
        trainer.save_checkpoint(self.path)


def require_usable_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise EvalmodeError unless a run may write to `out`. Reads a little and changes nothing.

    1. `resume` and `overwrite` exclude each other.
    2. The nearest existing folder among `out` and its parents is writable, as is the state's.
    3. No folder has the name of a file of the checkpoint.
    4. With `resume`, a state in `out` is complete.
    5. Without either, `out` holds no training, so none is lost by mistake.
    """
    if resume and overwrite:
        raise EvalmodeError(
            "--resume continues a training, and --overwrite starts over: use only one of them"
        )

    # The folder of the state and the nearest folder above it, in which the others are created.
    for folder in (out / STATE_FOLDER, out, *out.parents):
        if not os.path.lexists(folder):
            continue
        reason = None
        if not os.path.isdir(folder):
            reason = "is not a folder"
        elif not os.access(folder, os.W_OK | os.X_OK):
            reason = "may not be written to"
        if reason is not None:
            raise EvalmodeError(
                f"no training can be written to {out}: {folder} {reason}: choose another --out"
            )
        # The checkpoint is written to `out`, so the folder of the state alone is not enough.
        if folder != out / STATE_FOLDER:
            break

    # What no existing folder shows: a name that is too long.
    try:
        os.lstat(out)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise EvalmodeError(
            f"no training can be written to {out}: {error.strerror}: choose another --out"
        ) from error

    for name in (CHECKPOINT_FILE, WEIGHTS_FILE, HELD_OUT_FILE, TOKENIZER_FILE):
        path = out / name
        # A link to a folder can be replaced, but a folder cannot.
        if os.path.isdir(path) and not os.path.islink(path):
            raise EvalmodeError(
                f"no training can be written to {out}: {path} is a folder: choose another --out"
            )

    # `lexists`, because a file that is a broken link must not be replaced without a word.
    state_path = out / STATE_FOLDER / STATE_FILE
    has_state, has_checkpoint = os.path.lexists(state_path), os.path.lexists(out / CHECKPOINT_FILE)
    if has_state and resume:
        read_state(state_path)
        read_record(out / STATE_FOLDER / RUN_FILE)
    elif has_state and not overwrite:
        raise EvalmodeError(
            f"{out} holds an unfinished training: continue with --resume, start over with"
            " --overwrite, or choose another --out"
        )
    elif has_checkpoint and not (resume or overwrite):
        raise EvalmodeError(
            f"{out} holds a finished training: use it as it is with --resume, replace it with"
            " --overwrite, or choose another --out"
        )


def open_run(folder: Path, *, record: dict[str, Any], resume: bool) -> None:
    """Prepare the folder of the state for the run that `record` describes.

    With `resume` a state stays there; RunMismatch is raised if it is another run's. Without
    `resume`, or without a state, the folder is emptied and the record written. The caller has
    called `require_usable_folder`. Raises EvalmodeError if the folder cannot be written.
    """
    run_path = folder / RUN_FILE
    if resume and (folder / STATE_FILE).exists():
        require_same(read_record(run_path), record, path=run_path)
        return
    try:
        if os.path.lexists(folder):
            shutil.rmtree(folder)
        write_file(run_path, json.dumps(record, indent=1, sort_keys=True).encode())
    except OSError as error:
        remove_run(folder.parent)
        raise EvalmodeError(
            f"no training can be written to {folder.parent} ({error.strerror or error}):"
            " choose another --out"
        ) from error


def remove_run(out: Path) -> None:
    """Remove the state of an unfinished training from `out`, and `out` if it is then empty."""
    shutil.rmtree(out / STATE_FOLDER, ignore_errors=True)
    # `rmdir` fails if the folder is not empty.
    with suppress(OSError):
        out.rmdir()


def require_same(stored: dict[str, Any], record: dict[str, Any], *, path: Path) -> None:
    """Raise RunMismatch unless the records of two runs are equal.

    `stored` is the record of the earlier run, read from the file `path`; `record` is this run's.
    """
    differences = []
    for key in sorted(stored.keys() | record.keys()):
        if stored.get(key) != record.get(key):
            # A record leaves out options that were added later and have their default.
            before = reprlib.repr(stored[key]) if key in stored else "not set"
            now = reprlib.repr(record[key]) if key in record else "not set"
            differences.append(f"{key} was {before} and is now {now}")
    if differences:
        raise RunMismatch(
            f"{path} describes another training: {'; '.join(differences)}: use the same options,"
            " or another --out"
        )


def read_state(path: Path, *, map_location: Any = None) -> dict[str, Any]:
    """The state in a file: tensors and plain values, with REQUIRED_KEYS.

    Raises StateUnusable for bytes that no training wrote, and for another version of Lightning.
    """
    data = _read(path)
    digest_size = hashlib.sha256().digest_size
    # A memoryview, because a slice would copy the whole state.
    if hashlib.sha256(memoryview(data)[digest_size:]).digest() != data[:digest_size]:
        raise StateUnusable(
            f"{path} was cut short or changed ({len(data):,} bytes, which are not what the training"
            f" wrote): {START_OVER}"
        )
    try:
        # Tensors are loaded to the CPU, wherever they were saved, as Lightning's reader does.
        state: object = torch.load(
            io.BytesIO(data[digest_size:]), map_location=map_location or "cpu", weights_only=True
        )
    # torch raises RuntimeError, EOFError, UnpicklingError and others.
    except Exception as error:
        raise StateUnusable(f"{path} is not a state that torch can read: {START_OVER}") from error
    if not isinstance(state, dict):
        raise StateUnusable(
            f"{path} holds a {type(state).__name__} and not the state of a training: {START_OVER}"
        )
    for key, kind in REQUIRED_KEYS.items():
        if key not in state:
            raise StateUnusable(
                f"{path} is not the state of a training, since it lacks {key!r}: {START_OVER}"
            )
        if not isinstance(state[key], kind):
            raise StateUnusable(
                f"{path} is not the state of a training, since {key!r} is of type"
                f" {type(state[key]).__name__} and not {kind.__name__}: {START_OVER}"
            )
    version = state["pytorch-lightning_version"]
    # Another version may restore the state and then compute other bits.
    if version != lightning.__version__:
        raise StateUnusable(
            f"{path} was written by Lightning {version[:40]!r}, and {lightning.__version__!r} is"
            f" installed: {START_OVER}"
        )
    return state


def read_record(path: Path) -> dict[str, Any]:
    """The record of the run whose state is in the same folder. Raises StateUnusable."""
    try:
        record = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise StateUnusable(f"{path} is not complete JSON ({error}): {START_OVER}") from error
    if not isinstance(record, dict):
        raise StateUnusable(f"{path} does not describe a training: {START_OVER}")
    return record


def _read(path: Path) -> bytes:
    """The bytes of a file. Raises StateUnusable with the remedy of a state."""
    try:
        return read_file(path)
    except FileUnreadable as error:
        raise StateUnusable(f"{error.reason}: {START_OVER}") from error
