"""From a configuration to a finished checkpoint: data, network, Lightning's loop, temperature,
figures.

The same configuration gives the same bytes on the same machine, also when the run was killed and
resumed. Knows nothing of the command line.
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
from evalmode.bundle.frontend import (
    FrontEnd,
    FrontEndSpec,
    NgramFrontEnd,
    NgramSpec,
    open_frontend,
)
from evalmode.errors import EvalmodeError
from evalmode.model import checkpoint
from evalmode.model.batches import UNLABELLED, Batches, Rows, encode, joined
from evalmode.model.checkpoint import Checkpoint, CheckpointError, HeldOut
from evalmode.model.config import TrainConfig, TransformerConfig
from evalmode.model.data import LANGUAGES, DataSet, composed, open_data, tell_apart
from evalmode.model.early_stopping import Diverged, Validation
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
from evalmode.model.progress import ShowProgress
from evalmode.model.restoring import MarkRestored, misfit, reason_of, require_fit
from evalmode.model.resume import (
    BEGIN_ANEW,
    FOLDER,
    STATE_FILE,
    KeepState,
    StateNotWritten,
    WholeFiles,
    check_folder,
    open_run,
    read_state,
    remove_run,
    require_same,
)
from evalmode.model.texts import Texts
from evalmode.model.tokenizer_training import NGRAM_VOCABULARY, choose_frontend
from evalmode.model.transformer import Transformer
from evalmode.model.unlabelled import with_unlabelled

ROWS_TO_SHOW, FEWEST_EPOCHS, MOST_EPOCHS = 225_000, 2, 20
JUDGED_TRAIN_ROWS = 10_000
TABLE_SCALE = 0.1
ODD_TEXTS = ("", " ", "12:30", "?!", "👩‍👩‍👧 \u200d", "A", "\ud800", "word " * 400)
SAMPLED_LABELS, SAMPLED_POINTS = 24, 8_192


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a training came to. `seconds` are of this call alone; `metrics` as in Checkpoint."""

    checkpoint: Path
    metrics: Mapping[str, Measures]
    weights_sha256: str
    parameters: int
    epochs: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a run trains on: the three parts encoded, and what is known of the data and its rows.

    It holds no texts: a text of 20 MB that has an emoji takes 80 MB, and is read no further than
    its first 128 tokens.

    Texts without a label come last in `train` and `validation`.

    data_rows       labelled rows to train on
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
        """What another run must agree with to continue this one."""
        return self.config.record() | {"data_sha256": self.data_sha256}


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
    """Train as `config` says and leave the checkpoint in the folder `out`; None in every process
    but the first.

    `resume` goes on where a killed run stopped, starts one where there is none, and takes a
    finished one as it is. `overwrite` begins anew in place of what `out` holds. `cache` holds the
    default data set, `console` shows the progress, and `show_data` is called with the data before
    the training, in the first process. Raises DataError, RunMismatch or EvalmodeError with one
    sentence on what to mend; KeyboardInterrupt when the user stops it, and the run can be resumed
    then.
    """
    started = time.monotonic()
    torch.set_num_threads(config.threads)
    is_first = getattr(rank_zero_only, "rank", 0) == 0
    if is_first:
        check_folder(out, resume=resume, overwrite=overwrite)
    run = _prepare(config, cache=cache, show_data=show_data if is_first else None)
    if (
        resume
        and os.path.lexists(out / checkpoint.RECORD_FILE)
        and not (out / FOLDER / STATE_FILE).exists()
    ):
        try:
            finished = checkpoint.load(out)
        except CheckpointError as error:
            raise EvalmodeError(f"{error.reason}: {BEGIN_ANEW}") from error
        _require_same_run(finished, run, where=out / checkpoint.RECORD_FILE)
    else:
        validation = _train(run, out=out, resume=resume, console=console or Console(quiet=True))
        if validation is None:
            return None
        finished = _finish(run, validation.best_weights, epochs=validation.epochs)
        checkpoint.save(finished, out)
        rmtree(out / FOLDER)
    return Result(
        checkpoint=out,
        metrics=finished.metrics,
        weights_sha256=hashlib.sha256((out / checkpoint.WEIGHTS_FILE).read_bytes()).hexdigest(),
        parameters=sum(weight.numel() for weight in finished.module.parameters()),
        epochs=finished.provenance["epochs"],
        seconds=time.monotonic() - started,
    )


def _prepare(
    config: TrainConfig, *, cache: Path, show_data: Callable[[DataSet], None] | None
) -> _Run:
    data = open_data(
        config.data,
        text_column=config.text_column,
        label_column=config.label_column,
        separator=config.separator,
        cache=cache,
        identity=_identity(config),
    )
    data = with_unlabelled(data)
    spec, tokenizer = choose_frontend(config, data)
    parts = _encoded(data, open_frontend(spec, tokenizer))
    if config.data != LANGUAGES:  # whose rows are what they are, for the sake of its sha256
        keys = {
            name: [parts[name][number].tobytes() for number in range(len(part.texts))]
            for name, part in _parts_of(data).items()
        }
        apart = tell_apart(data, keys)
        if apart is not data:
            data, parts = apart, _regrouped(apart, before=data, parts=parts)
    if show_data is not None:
        show_data(data)
    return _Run(
        config=config,
        data_name=data.name,
        data_sha256=data.sha256,
        data_rows=len(data.train.texts),
        labels=data.labels,
        sample_texts=(*ODD_TEXTS, *_one_a_label(data.test)),
        spec=spec,
        tokenizer=tokenizer,
        **parts,
    )


def _identity(config: TrainConfig) -> Callable[[str], bytes]:
    """What texts have in common that the front end reads alike, as far as data alone can say.

    n-grams need no training, so theirs are the ids themselves.
    """
    if config.frontend != "ngrams":
        return composed
    frontend = NgramFrontEnd(NgramSpec(vocabulary=config.vocabulary or NGRAM_VOCABULARY))
    return lambda text: hashlib.sha256(frontend.encode(text).ids.tobytes()).digest()


def _parts_of(data: DataSet) -> dict[str, Texts]:
    return {"train": data.train, "validation": data.validation, "test": data.test}


def _encoded(data: DataSet, frontend: FrontEnd) -> dict[str, Rows]:
    """The three parts; the texts without a label come last in training and validation."""
    unlabelled, labels = _unlabelled_of(data), _label_numbers(data)
    return {
        name: encode(part.texts + unlabelled[name], labels[name], frontend=frontend)
        for name, part in _parts_of(data).items()
    }


def _regrouped(data: DataSet, *, before: DataSet, parts: Mapping[str, Rows]) -> dict[str, Rows]:
    """The rows of `data`, whose texts are some of those of `before`, which are encoded in `parts`.

    A label that has lost its training rows moves its others, so a row may be in another part now.
    """
    ids = {
        text: parts[name].ids(number)
        for name, part in _parts_of(before).items()
        for number, text in enumerate(part.texts + _unlabelled_of(before)[name])
    }
    unlabelled, labels = _unlabelled_of(data), _label_numbers(data)
    return {
        name: joined([ids[text] for text in part.texts + unlabelled[name]], labels[name])
        for name, part in _parts_of(data).items()
    }


def _unlabelled_of(data: DataSet) -> dict[str, tuple[str, ...]]:
    return {"train": data.unlabelled, "validation": data.unlabelled_validation, "test": ()}


def _label_numbers(data: DataSet) -> dict[str, list[int]]:
    """The label of each row as a number, part by part; UNLABELLED for those without a label."""
    index = {label: number for number, label in enumerate(data.labels)}
    return {
        name: [index[label] for label in part.labels]
        + [UNLABELLED] * len(_unlabelled_of(data)[name])
        for name, part in _parts_of(data).items()
    }


def _train(run: _Run, *, out: Path, resume: bool, console: Console) -> Validation | None:
    """What validation kept; None in every process but the first. Leaves the state it could resume
    from in `out`.
    """
    config, state = run.config, out / FOLDER / STATE_FILE
    epochs = config.epochs or min(
        MOST_EPOCHS, max(FEWEST_EPOCHS, round(ROWS_TO_SHOW / len(run.train)))
    )
    validation = Validation(run.validation, spec=run.spec, patience=config.patience)
    restoring = MarkRestored()
    callbacks = [
        restoring,  # first: an error in another's `on_train_start` is no longer the state's
        validation,
        ShowProgress(console, epochs=epochs),
        KeepState(state, steps=config.save_steps, record=run.record),
    ]
    with _quiet():
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
        learner = Learner(
            _network(run), config=config, batches=batches, steps=epochs * len(batches)
        )
        is_resumed = resume and state.exists()
        if is_resumed:
            require_fit(
                read_state(state),
                trainer=trainer,
                learner=learner,
                validation=validation,
                record=run.record,
                where=state,
            )
        try:
            trainer.fit(learner, ckpt_path=state if is_resumed else None)
        except SystemExit as stopped:  # how Lightning passes a Ctrl-C on
            raise KeyboardInterrupt from stopped
        except StateNotWritten:
            if not state.exists():  # nothing can be resumed from what is there
                remove_run(out)
            raise
        except Diverged:
            rmtree(out / FOLDER, ignore_errors=True)  # nobody should resume it
            raise
        except (EvalmodeError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if is_resumed and not restoring.is_over:
                raise misfit(state, reason_of(error)) from error
            raise
    return validation if trainer.is_global_zero else None


def _trainer(
    config: TrainConfig, *, epochs: int, callbacks: list[lightning.Callback]
) -> lightning.Trainer:
    try:
        return lightning.Trainer(
            accelerator="auto",
            devices=config.devices,
            num_nodes=config.nodes,
            strategy=config.strategy,
            max_epochs=epochs,
            max_time=None if config.max_minutes is None else timedelta(minutes=config.max_minutes),
            gradient_clip_val=config.clip_norm,
            deterministic=True,
            callbacks=callbacks,
            plugins=[WholeFiles()],
            use_distributed_sampler=False,  # Batches deals the rows out to the processes itself
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (ValueError, MisconfigurationException) as error:
        asked = f"--devices {config.devices} --nodes {config.nodes} --strategy {config.strategy}"
        raise EvalmodeError(f"Lightning cannot train with {asked}: {error}") from error


def _network(run: _Run) -> Transformer:
    """The untrained network, the same in every process."""
    torch.manual_seed(step_seed(run.config.seed, step=-1, rank=0))
    network = Transformer(_shape(run))
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


def _shape(run: _Run) -> TransformerConfig:
    return run.config.network(
        vocabulary=run.spec.vocabulary,
        labels=len(run.labels),
        positions=run.spec.lengths[-1],
        ids_per_position=run.spec.ids_per_position,
    )


def _finish(run: _Run, weights: Mapping[str, Tensor], *, epochs: int) -> Checkpoint:
    """The network with these weights, its temperature fitted and folded in, judged on the three
    parts.
    """
    network = Transformer(_shape(run)).eval()
    network.load_state_dict(weights)
    validation = run.validation.labelled
    temperature = fit_temperature(predict(network, validation, spec=run.spec), validation.labels)
    fold_temperature(network.head, temperature)
    # The training accuracy is of some rows, evenly spread: it is shown for its gap to the test's.
    labelled = np.flatnonzero(run.train.labels != UNLABELLED)
    train = run.train.take(labelled[:: -(-len(labelled) // JUDGED_TRAIN_ROWS)])
    parts = {"train": train, "validation": validation, "test": run.test}
    metrics: dict[str, Measures] = {
        name: {
            **quality(predict(network, rows, spec=run.spec), rows.labels),
            "rows": len(rows),
            **not_tested(rows.labels, run.labels),
        }
        for name, rows in parts.items()
    }
    return Checkpoint(
        module=network,
        frontend=run.spec,
        tokenizer=run.tokenizer,
        labels=run.labels,
        held_out=HeldOut(
            rows=[run.test[number] for number in range(len(run.test))], labels=run.test.labels
        ),
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


def _require_same_run(finished: Checkpoint, run: _Run, *, where: Path) -> None:
    """Raise RunMismatch unless `finished` is what `run` would come to, and EvalmodeError where it
    does not say.
    """
    provenance = finished.provenance
    try:
        record = provenance["training"] | {"data_sha256": provenance["data"]["sha256"]}
        says_all = isinstance(provenance["epochs"], int)
    except (KeyError, TypeError):
        says_all = False
    if not says_all:
        raise EvalmodeError(f"{where} does not say how it was trained: {BEGIN_ANEW}")
    require_same(record, run.record, where=where)


def _one_a_label(texts: Texts) -> tuple[str, ...]:
    """The first text of each label, of at most SAMPLED_LABELS labels, and no more of it than a
    model may read.
    """
    first = dict(zip(reversed(texts.labels), reversed(texts.texts), strict=True))
    return tuple(first[label][:SAMPLED_POINTS] for label in sorted(first)[:SAMPLED_LABELS])


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning without its tips, its device report and its advice, which speak to its own users
    and not to ours.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
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
