"""From a configuration to a finished checkpoint: data, network, Lightning's loop, temperature, figures.

The same configuration gives the same bytes on the same machine, also when the run was killed and resumed. Knows nothing
of the command line.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from shutil import rmtree
from typing import Any

import lightning
import numpy as np
import torch
from rich.console import Console

import evalmode
from evalmode.bundle.frontend import BpeSpec, FrontEnd, NgramSpec, open_frontend
from evalmode.model import checkpoint
from evalmode.model.batches import UNLABELLED, Batches, Rows, encode
from evalmode.model.checkpoint import Checkpoint, HeldOut
from evalmode.model.config import TrainConfig
from evalmode.model.data import DataSet, open_data
from evalmode.model.evaluation import fit_temperature, fold_temperature, predict, quality
from evalmode.model.frontends import choose_frontend
from evalmode.model.learner import Learner, step_seed
from evalmode.model.prior import informed_table
from evalmode.model.progress import ShowProgress
from evalmode.model.run_state import FOLDER, KeepState, WholeFiles, open_run, require_same
from evalmode.model.transformer import Transformer
from evalmode.model.validation import Validation

ROWS_TO_SHOW, FEWEST_EPOCHS, MOST_EPOCHS = 150_000, 2, 20
JUDGED_TRAIN_ROWS = 10_000  # the training accuracy is of so many rows: it is shown for the gap to test, no more
TABLE_SCALE = 0.3
ODD_TEXTS = ("", " ", "12:30", "?!", "👩‍👩‍👧 \u200d", "A", "\ud800", "word " * 400)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a training came to. `seconds` are of this call alone; `metrics` as in Checkpoint."""

    checkpoint: Path
    metrics: dict[str, dict[str, float]]
    weights_sha256: str
    parameters: int
    epochs: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """The data of a run as rows, and what encoded it."""

    data: DataSet
    spec: NgramSpec | BpeSpec
    tokenizer: str | None
    frontend: FrontEnd
    train: Rows
    validation: Rows
    test: Rows


def fit(
    config: TrainConfig,
    *,
    out: Path,
    resume: bool = False,
    cache: Path = Path(".cache"),
    console: Console | None = None,
) -> Result | None:
    """Train as `config` says and leave the checkpoint in the folder `out`; None in every process but the first.

    `resume` goes on where a killed run stopped, starts one where there is none, and takes a finished one as it is.
    `cache` holds the default data set, `console` shows the progress. Raises DataError, RunMismatch or EvalmodeError
    with one sentence on what to mend.
    """
    started = time.monotonic()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    console = console or Console(quiet=True)
    data = open_data(config.data, text_column=config.text_column, label_column=config.label_column, cache=cache)
    record = config.record() | {"data_sha256": data.sha256}
    if resume and (out / checkpoint.RECORD_FILE).exists():
        return _finished(out, record, started=started)
    with _quiet():
        run = _prepare(config, data)
        network, validation, main = _train(config, run, out=out, record=record, resume=resume, console=console)
        if not main:
            return None
        network.load_state_dict(validation.best_weights)
        sha256, metrics = _finish(network.cpu(), run, config=config, out=out)
    rmtree(out / FOLDER)
    return _result(out, network, metrics, sha256, started=started)
