"""Lightning's loop as `train_network` uses it: a quiet trainer, and errors for the user."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from shutil import rmtree
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from evalmode.errors import EvalmodeError
from evalmode.model.config import TrainConfig
from evalmode.model.early_stopping import Diverged
from evalmode.model.restoring import MOST_CHARACTERS, mismatch_error
from evalmode.model.resume import (
    STATE_FILE,
    STATE_FOLDER,
    AtomicCheckpointIO,
    StateNotWritten,
    remove_run,
)


class RestoreMonitor(lightning.Callback):
    """Knows whether Lightning has restored the state. A later error is not the state's fault."""

    def __init__(self) -> None:
        self.is_restored = False

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Note that the state is restored: Lightning restores its last part before this call."""
        self.is_restored = True


def create_trainer(
    config: TrainConfig, *, epochs: int, callbacks: list[lightning.Callback]
) -> lightning.Trainer:
    """A trainer with the devices and limits of `config`, which calls `callbacks` in their order.

    Raises EvalmodeError for devices or a strategy that Lightning does not have.
    """
    max_time = None
    if config.max_minutes is not None:
        max_time = timedelta(minutes=config.max_minutes)
    try:
        return lightning.Trainer(
            accelerator="auto",
            devices=config.devices,
            num_nodes=config.nodes,
            strategy=config.strategy,
            max_epochs=epochs,
            max_time=max_time,
            gradient_clip_val=config.clip_norm,
            deterministic=True,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            # `Batches` distributes the rows among the processes.
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (ValueError, MisconfigurationException) as error:
        flags = f"--devices {config.devices} --nodes {config.nodes} --strategy {config.strategy}"
        raise EvalmodeError(f"Lightning cannot train with {flags}: {error}") from error


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's tips, device report and advice: they are for users of Lightning."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    # The trainer switches deterministic algorithms on for the whole process.
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.|torch\.")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was_deterministic)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def failures_handled(
    out: Path, *, restored_path: Path | None, monitor: RestoreMonitor
) -> Iterator[None]:
    """A context for `trainer.fit`, which cleans up in `out` and raises the error for the user.

    restored_path is the state that the run resumes from; None for a new run. The cases:

    1. SystemExit is what Lightning makes of a Ctrl-C. It becomes KeyboardInterrupt again.
    2. The state cannot be saved. If there is no earlier one, its folder is removed.
    3. The training diverged. The state is removed, because a resumed run would diverge again.
    4. Other errors of evalmode, and too little memory, say all that is needed.
    5. Any other error while Lightning restores the state means that the state is unusable.

    In cases 2 to 4, and for all other errors, the error itself is raised.
    """
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    except StateNotWritten:
        if not (out / STATE_FOLDER / STATE_FILE).exists():
            remove_run(out)
        raise
    except Diverged:
        rmtree(out / STATE_FOLDER, ignore_errors=True)
        raise
    except (EvalmodeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if restored_path is None or monitor.is_restored:
            raise
        # The message of a library may have several lines; this one becomes part of a sentence.
        message = " ".join(str(error).split())[:MOST_CHARACTERS]
        reason = f"{type(error).__name__} {message}".strip()
        raise mismatch_error(restored_path, reason) from error
