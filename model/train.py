"""A training from its configuration to its checkpoint.

1. `prepare` reads the data, trains the front end and encodes the texts.
2. `train_network` runs Lightning's loop, saves the state, and resumes a killed run.
3. `finish` fits the temperature, measures the three parts and makes the checkpoint.

The same configuration gives the same bytes on the same machine, also if the run was killed and
resumed. The defaults, such as the number of epochs, are in config.py.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from shutil import rmtree
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch import Tensor

import evalmode
from evalmode.bundle.frontend import FrontEndSpec, NgramFrontEnd, NgramSpec, open_frontend
from evalmode.errors import EvalmodeError
from evalmode.model import checkpoint
from evalmode.model.batches import UNLABELLED, Batches, Rows
from evalmode.model.checkpoint import Checkpoint, CheckpointError, HeldOut
from evalmode.model.config import TrainConfig, TransformerConfig
from evalmode.model.data import LANGUAGES, composed, open_data
from evalmode.model.data_set import DataSet
from evalmode.model.early_stopping import Diverged, Validation
from evalmode.model.encoding import drop_twins, encode_parts
from evalmode.model.informed_table import informed_table
from evalmode.model.learner import Learner, step_seed
from evalmode.model.metrics import (
    Measures,
    fit_temperature,
    fold_temperature,
    not_tested,
    predict,
    quality,
)
from evalmode.model.networks import Network, network_of
from evalmode.model.progress import ShowProgress
from evalmode.model.restoring import RestoreMonitor, one_line, require_fit, unfit_state
from evalmode.model.resume import (
    FOLDER,
    START_OVER,
    STATE_FILE,
    AtomicCheckpointIO,
    SaveState,
    StateNotWritten,
    open_run,
    read_state,
    remove_run,
    require_same,
    require_usable_folder,
)
from evalmode.model.tokenizer_training import NGRAM_VOCABULARY, choose_frontend
from evalmode.model.unlabelled import with_unlabelled

# Training rows on which the training accuracy is measured, for its gap to the test accuracy.
MEASURED_TRAIN_ROWS = 10_000
# `scale` of the informed table; the noise that it replaces has a standard deviation of 0.02.
TABLE_SCALE = 0.1

# Sample texts of a checkpoint: these, and the first test text of some labels, cut to what a model
# may read. The export computes known answers for them.
ODD_TEXTS = ("", " ", "12:30", "?!", "👩‍👩‍👧 \u200d", "A", "\ud800", "word " * 400)
SAMPLED_LABELS, SAMPLED_POINTS = 24, 8_192


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of a training. `seconds` is the time of this call; `metrics` as in Checkpoint."""

    checkpoint: Path
    metrics: Mapping[str, Measures]
    weights_sha256: str
    parameters: int
    epochs: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """The encoded data of a run, and what its checkpoint states about the data.

    There are no texts in it: a text of 20 MB with an emoji takes 80 MB, and the model reads no more
    than its first 128 tokens.

    data_rows       number of training rows with a label
    sample_texts    texts for the export, cut to what a model may read
    """

    config: TrainConfig
    data_name: str
    data_sha256: str
    data_rows: int
    labels: tuple[str, ...]
    sample_texts: tuple[str, ...]
    spec: FrontEndSpec
    tokenizer: str | None
    train: Rows
    validation: Rows
    test: Rows

    @property
    def record(self) -> dict[str, Any]:
        """The options and the data that a run must share to continue another one."""
        return self.config.record() | {"data_sha256": self.data_sha256}

    @property
    def shape(self) -> TransformerConfig:
        """The shape of the network for this data."""
        return self.config.network(
            vocabulary=self.spec.vocabulary,
            labels=len(self.labels),
            positions=self.spec.lengths[-1],
            ids_per_position=self.spec.ids_per_position,
        )


def fit(
    config: TrainConfig,
    *,
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    cache: Path,
    console: Console | None = None,
    show_data: Callable[[DataSet], None] | None = None,
) -> Result | None:
    """Train with the options of `config` and write the checkpoint to the folder `out`.

    resume      continue a killed run; start one if there is none; accept a finished one as it is
    overwrite   start again in place of the training in `out`
    cache       folder for the default data set
    console     where the progress is printed; None: nowhere
    show_data   called with the data before the training, in the first process

    Returns None in every process but the first. Raises DataError, RunMismatch or EvalmodeError with
    one sentence that says what to change. Ctrl-C raises KeyboardInterrupt; the run can be resumed.

        fit(TrainConfig(data="reviews.csv"), out=Path("runs/reviews"), cache=Path("cache"))
    """
    started = time.monotonic()
    torch.set_num_threads(config.threads)
    is_first_process = getattr(rank_zero_only, "rank", 0) == 0
    if is_first_process:
        require_usable_folder(out, resume=resume, overwrite=overwrite)
    run = prepare(config, cache=cache, show_data=show_data if is_first_process else None)

    record_path, state_path = out / checkpoint.RECORD_FILE, out / FOLDER / STATE_FILE
    if resume and os.path.lexists(record_path) and not state_path.exists():
        # The training is finished: nothing is left to do if it is the same one.
        try:
            finished = checkpoint.load(out)
        except CheckpointError as error:
            raise EvalmodeError(f"{error.reason}: {START_OVER}") from error
        _require_same_run(finished, run, where=record_path)
    else:
        validation = train_network(
            run, out=out, resume=resume, console=console or Console(quiet=True)
        )
        if validation is None:
            return None
        finished = finish(run, validation.best_weights, epochs=validation.epochs)
        checkpoint.save(finished, out)
        # The state goes last: a kill before this line costs nothing, because the run resumes at
        # its last step and writes the same checkpoint.
        rmtree(out / FOLDER)

    return Result(
        checkpoint=out,
        metrics=finished.metrics,
        weights_sha256=hashlib.sha256((out / checkpoint.WEIGHTS_FILE).read_bytes()).hexdigest(),
        parameters=sum(weight.numel() for weight in finished.module.parameters()),
        epochs=finished.provenance["epochs"],
        seconds=time.monotonic() - started,
    )


def prepare(
    config: TrainConfig, *, cache: Path, show_data: Callable[[DataSet], None] | None
) -> Run:
    """Read the data, train the front end on it, and encode the texts."""
    # What texts must share to count as one. n-grams need no training, so their ids are known now.
    # The ids of a tokenizer are not: `drop_twins` compares them below.
    identity = composed
    if config.frontend == "ngrams":
        ngrams = NgramFrontEnd(NgramSpec(vocabulary=config.vocabulary or NGRAM_VOCABULARY))

        def identity(text: str) -> bytes:
            return hashlib.sha256(ngrams.encode(text).ids.tobytes()).digest()

    data = open_data(
        config.data,
        text_column=config.text_column,
        label_column=config.label_column,
        separator=config.separator,
        cache=cache,
        identity=identity,
    )
    data = with_unlabelled(data)
    spec, tokenizer = choose_frontend(config, data)
    parts = encode_parts(data, open_frontend(spec, tokenizer))
    if config.data != LANGUAGES:  # the rows of the default data set, and its sha256, are fixed
        data, parts = drop_twins(data, parts)
    if show_data is not None:
        show_data(data)

    first_texts: dict[str, str] = {}
    for text, label in zip(data.test.texts, data.test.labels, strict=True):
        first_texts.setdefault(label, text)
    sampled_labels = sorted(first_texts)[:SAMPLED_LABELS]
    return Run(
        config=config,
        data_name=data.name,
        data_sha256=data.sha256,
        data_rows=len(data.train.texts),
        labels=data.labels,
        sample_texts=(
            *ODD_TEXTS,
            *(first_texts[label][:SAMPLED_POINTS] for label in sampled_labels),
        ),
        spec=spec,
        tokenizer=tokenizer,
        **parts,
    )


def train_network(run: Run, *, out: Path, resume: bool, console: Console) -> Validation | None:
    """Train the network; the result holds the best weights. None in every process but the first.

    The state from which a killed run resumes stays in `out`: `fit` removes it.
    """
    config, state_path = run.config, out / FOLDER / STATE_FILE
    epochs = config.epochs_for(len(run.train))
    validation = Validation(run.validation, spec=run.spec, patience=config.patience)
    restore_monitor = RestoreMonitor()
    callbacks = [
        # The first callback: an error in `on_train_start` of another one is not the state's.
        restore_monitor,
        validation,
        ShowProgress(console, epochs=epochs),
        # The last callback: it saves the state of the others.
        SaveState(state_path, steps=config.save_steps, record=run.record),
    ]
    with _quiet_lightning():
        trainer = _trainer(config, epochs=epochs, callbacks=callbacks)
        batches = Batches(
            run.train,
            spec=run.spec,
            batch_rows=config.batch_rows,
            seed=config.seed,
            crop=config.crop,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )
        if trainer.is_global_zero:
            open_run(out / FOLDER, record=run.record, resume=resume)
        steps = epochs * len(batches)
        learner = Learner(untrained_network(run), config=config, batches=batches, steps=steps)
        is_resumed = resume and state_path.exists()
        if is_resumed:
            require_fit(
                read_state(state_path),
                trainer=trainer,
                learner=learner,
                validation=validation,
                record=run.record,
                where=state_path,
            )
        try:
            trainer.fit(learner, ckpt_path=state_path if is_resumed else None)
        except SystemExit as error:
            # Lightning turns a Ctrl-C into SystemExit.
            raise KeyboardInterrupt from error
        except StateNotWritten:
            if not state_path.exists():  # there is nothing to resume from
                remove_run(out)
            raise
        except Diverged:
            # A resumed run would diverge again.
            rmtree(out / FOLDER, ignore_errors=True)
            raise
        except (EvalmodeError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if is_resumed and not restore_monitor.is_restored:
                raise unfit_state(state_path, one_line(error)) from error
            raise
    return validation if trainer.is_global_zero else None


def untrained_network(run: Run) -> Network:
    """The network before its first step, the same in every process."""
    # Step -1, because the steps of the training count from 0.
    torch.manual_seed(step_seed(run.config.seed, step=-1, rank=0))
    network = network_of(run.shape)
    if run.config.informed_table:
        table = network.embedding.table.weight
        guess = informed_table(
            run.train,
            vocabulary=table.shape[0],
            labels=len(run.labels),
            width=table.shape[1],
            scale=TABLE_SCALE,
            seed=run.config.seed,
        )
        with torch.no_grad():
            table.copy_(guess)
    return network


def finish(run: Run, weights: Mapping[str, Tensor], *, epochs: int) -> Checkpoint:
    """The checkpoint of a network with these weights, after `epochs` epochs."""
    network = network_of(run.shape).eval()
    network.load_state_dict(weights)

    # The temperature makes the scores honest. Folded into the head it costs no operator.
    validation = run.validation.labelled
    temperature = fit_temperature(predict(network, validation, spec=run.spec), validation.labels)
    fold_temperature(network.head, temperature)

    # Evenly spaced training rows: every n-th of those with a label.
    labelled = np.flatnonzero(run.train.labels != UNLABELLED)
    train = run.train.take(labelled[:: -(-len(labelled) // MEASURED_TRAIN_ROWS)])
    metrics: dict[str, Measures] = {}
    for name, rows in (("train", train), ("validation", validation), ("test", run.test)):
        metrics[name] = {
            **quality(predict(network, rows, spec=run.spec), rows.labels),
            "rows": len(rows),
            **not_tested(rows.labels, run.labels),
        }

    test_rows = [run.test[index] for index in range(len(run.test))]
    return Checkpoint(
        module=network,
        frontend=run.spec,
        tokenizer=run.tokenizer,
        labels=run.labels,
        held_out=HeldOut(rows=test_rows, labels=run.test.labels),
        sample_texts=run.sample_texts,
        metrics=metrics,
        provenance={
            "evalmode": evalmode.__version__,
            "torch": torch.__version__,
            "seed": run.config.seed,
            "data": {
                "name": run.data_name,
                "sha256": run.data_sha256,
                "rows": run.data_rows,
            },
            "training": run.config.record(),
            "epochs": epochs,
            "temperature": temperature,
        },
    )


def _trainer(
    config: TrainConfig, *, epochs: int, callbacks: list[lightning.Callback]
) -> lightning.Trainer:
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
            use_distributed_sampler=False,  # Batches distributes the rows itself
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (ValueError, MisconfigurationException) as error:
        flags = f"--devices {config.devices} --nodes {config.nodes} --strategy {config.strategy}"
        raise EvalmodeError(f"Lightning cannot train with {flags}: {error}") from error


def _require_same_run(finished: Checkpoint, run: Run, *, where: Path) -> None:
    """Raise RunMismatch unless `run` would give the checkpoint `finished`.

    Raises EvalmodeError if its provenance does not say how it was trained.
    """
    provenance = finished.provenance
    try:
        record = provenance["training"] | {"data_sha256": provenance["data"]["sha256"]}
        is_complete = isinstance(provenance["epochs"], int)
    except (KeyError, TypeError):
        is_complete = False
    if not is_complete:
        raise EvalmodeError(f"{where} does not say how it was trained: {START_OVER}")
    require_same(record, run.record, where=where)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence Lightning's tips, device report and advice, which are for its own users."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    # The trainer switches this on for the whole process.
    deterministic = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.|torch\.")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
