"""A training from its configuration to its checkpoint.

`fit` runs the steps in this order:

1. `prepare` (preparation.py) reads the data, trains the front end and encodes the texts.
2. `train_network` runs Lightning's loop. It saves the state, from which a killed run resumes.
3. `finished_checkpoint` sets the temperature, measures the accuracy on the training, validation and
   test parts, and makes the checkpoint.

The same configuration gives the same bytes on the same machine, even if the run was killed and
resumed. The defaults, such as the number of epochs, are in config.py.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch import Tensor

import evalmode
from evalmode.errors import EvalmodeError
from evalmode.model import checkpoint, metrics
from evalmode.model.batches import UNLABELLED, Batches
from evalmode.model.checkpoint import Checkpoint, CheckpointError, HeldOut
from evalmode.model.config import TrainConfig
from evalmode.model.data_set import DataSet
from evalmode.model.early_stopping import Validation
from evalmode.model.informed_table import label_evidence_table
from evalmode.model.learner import Learner, step_seed
from evalmode.model.lightning_loop import (
    RestoreMonitor,
    create_trainer,
    failures_handled,
    quiet_lightning,
)
from evalmode.model.metrics import Measures
from evalmode.model.networks import Network, network_of
from evalmode.model.preparation import PreparedRun, prepare
from evalmode.model.progress import ShowProgress
from evalmode.model.restoring import require_matching_state
from evalmode.model.resume import (
    START_OVER,
    STATE_FILE,
    STATE_FOLDER,
    SaveState,
    open_run,
    read_state,
    require_same,
    require_usable_folder,
)

# The accuracy on training rows is shown for its gap to the test accuracy. A sample of at most this
# many rows is enough for that.
MEASURED_TRAIN_ROWS = 10_000
# With the option `informed_table`, the embedding table starts as the evidence of each id for each
# label, multiplied by this. Without it, it starts as noise with a standard deviation of 0.02.
TABLE_SCALE = 0.1


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
class Trained:
    """The best weights of a training, and the number of epochs that it took."""

    weights: Mapping[str, Tensor]
    epochs: int


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

    A training writes its checkpoint, and then removes its state. So `resume` finds:

        a state             the run was killed: it continues from the state
        only a checkpoint   the run is finished: the checkpoint is loaded, and nothing is trained
        neither             a new run begins

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

    has_state = resume and (out / STATE_FOLDER / STATE_FILE).exists()
    # `lexists`, because a checkpoint that is a broken link is an error and not a missing training.
    has_checkpoint = resume and os.path.lexists(out / checkpoint.CHECKPOINT_FILE)
    is_finished = has_checkpoint and not has_state
    if is_finished:
        if not is_first_process:
            return None
        finished = load_finished(out, run=run)
    else:
        trained = train_network(run, out=out, resume=resume, console=console or Console(quiet=True))
        if trained is None:
            return None
        finished = finished_checkpoint(run, trained)
        checkpoint.save(finished, out)
        # After the checkpoint: a run that is killed before this line resumes at its last step and
        # writes the same checkpoint again.
        rmtree(out / STATE_FOLDER)

    return Result(
        checkpoint=out,
        metrics=finished.metrics,
        weights_sha256=hashlib.sha256((out / checkpoint.WEIGHTS_FILE).read_bytes()).hexdigest(),
        parameters=sum(weight.numel() for weight in finished.module.parameters()),
        epochs=finished.provenance["epochs"],
        seconds=time.monotonic() - started,
    )


def train_network(run: PreparedRun, *, out: Path, resume: bool, console: Console) -> Trained | None:
    """Train the network. None in every process but the first.

    The state from which a killed run resumes stays in `out`: `fit` removes it.
    """
    config, state_path = run.config, out / STATE_FOLDER / STATE_FILE
    epochs = config.epochs_for(len(run.train))
    validation = Validation(run.validation, spec=run.spec, patience=config.patience)
    # Notes that the training has begun. An error before that means that the saved state could not
    # be restored, and `failures_handled` says so.
    restore_monitor = RestoreMonitor()
    # Lightning calls the callbacks in this order.
    callbacks = [
        # First: an error of another callback comes after the beginning.
        restore_monitor,
        validation,
        ShowProgress(console, epochs=epochs),
        # Last: it saves what the other callbacks hold.
        SaveState(state_path, steps=config.save_steps, record=run.record),
    ]
    with quiet_lightning():
        trainer = create_trainer(config, epochs=epochs, callbacks=callbacks)
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
            open_run(out / STATE_FOLDER, record=run.record, resume=resume)
        steps = epochs * len(batches)
        learner = Learner(untrained_network(run), config=config, batches=batches, steps=steps)

        restored_path = None
        if resume and state_path.exists():
            restored_path = state_path
            # Lightning itself would accept another training's state, and end with other weights.
            require_matching_state(
                read_state(state_path),
                trainer=trainer,
                learner=learner,
                validation=validation,
                record=run.record,
                path=state_path,
            )
        with failures_handled(out, restored_path=restored_path, monitor=restore_monitor):
            trainer.fit(learner, ckpt_path=restored_path)
    if not trainer.is_global_zero:
        return None
    return Trained(weights=validation.best_weights, epochs=validation.epochs)


def untrained_network(run: PreparedRun) -> Network:
    """The network before its first step, the same in every process."""
    # Step -1, because the steps of the training count from 0.
    torch.manual_seed(step_seed(run.config.seed, step=-1, rank=0))
    network = network_of(run.network_config)
    if run.config.informed_table:
        table = network.embedding.table.weight
        evidence = label_evidence_table(
            run.train,
            vocabulary=table.shape[0],
            labels=len(run.labels),
            width=table.shape[1],
            scale=TABLE_SCALE,
            seed=run.config.seed,
        )
        with torch.no_grad():
            table.copy_(evidence)
    return network


def finished_checkpoint(run: PreparedRun, trained: Trained) -> Checkpoint:
    """The checkpoint of a run: the trained network, calibrated, and its measures."""
    network = network_of(run.network_config).eval()
    network.load_state_dict(trained.weights)

    # The temperature calibrates the scores. Folded into the head, it costs no operator.
    validation_rows = run.validation.labelled
    validation_logits = metrics.predict(network, validation_rows, spec=run.spec)
    temperature = metrics.optimal_temperature(validation_logits, validation_rows.labels)
    metrics.fold_temperature(network.head, temperature)

    # A sample of the training rows: every n-th row with a label, where n is the smallest number
    # that leaves at most MEASURED_TRAIN_ROWS.
    labelled_indices = np.flatnonzero(run.train.labels != UNLABELLED)
    stride = math.ceil(len(labelled_indices) / MEASURED_TRAIN_ROWS)
    train_sample = run.train.take(labelled_indices[::stride])

    parts = {"train": train_sample, "validation": validation_rows, "test": run.test}
    measures: dict[str, Measures] = {}
    for name, rows in parts.items():
        logits = metrics.predict(network, rows, spec=run.spec)
        measures[name] = {
            **metrics.accuracy_and_f1(logits, rows.labels),
            "rows": len(rows),
            **metrics.untested_classes(rows.labels, run.labels),
        }

    test_rows = [run.test[index] for index in range(len(run.test))]
    return Checkpoint(
        module=network,
        frontend=run.spec,
        tokenizer=run.tokenizer,
        labels=run.labels,
        held_out=HeldOut(rows=test_rows, labels=run.test.labels),
        sample_texts=run.sample_texts,
        metrics=measures,
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
            "epochs": trained.epochs,
            "temperature": temperature,
        },
    )


def load_finished(out: Path, *, run: PreparedRun) -> Checkpoint:
    """The checkpoint in `out`, which `run` would write again.

    Raises RunMismatch if it comes from other options or other data. Raises EvalmodeError if it
    cannot be loaded, or if its provenance does not say how it was trained.
    """
    path = out / checkpoint.CHECKPOINT_FILE
    try:
        finished = checkpoint.load(out)
    except CheckpointError as error:
        raise EvalmodeError(f"{error.reason}: {START_OVER}") from error

    provenance = finished.provenance
    try:
        record = provenance["training"] | {"data_sha256": provenance["data"]["sha256"]}
        epochs = provenance["epochs"]
    except (KeyError, TypeError) as error:
        raise EvalmodeError(f"{path} does not say how it was trained: {START_OVER}") from error
    if not isinstance(epochs, int):
        raise EvalmodeError(f"{path} does not say for how many epochs it was trained: {START_OVER}")
    require_same(record, run.record, path=path)
    return finished
