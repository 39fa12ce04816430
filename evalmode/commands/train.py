"""`evalmode train`: trains a transformer and writes a checkpoint.

A field of `TrainConfig` in model/config.py is a flag if it has a help text in `_HELP`. Its type and
its default are those of the field. Four more flags say where the run writes and how it begins:
`--out`, `--resume`, `--overwrite` and `--cache`.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import typer

from evalmode import CACHE
from evalmode.commands.generated import command_of, flag_parameter
from evalmode.errors import EvalmodeError
from evalmode.terminal import open_console

EPILOG = (
    "Examples:  evalmode train   |   evalmode train --data reviews.csv --label-column stars"
    " --out runs/reviews"
)
_HELP = {
    "data": "`languages`, or a CSV, TSV, JSONL or Parquet file.",
    "text_column": "The column of texts. \\[default: the first with a usual name]",
    "label_column": "The column of labels. \\[default: the first with a usual name]",
    "separator": "The separator of a CSV or TSV file, such as ';' or tab.",
    "out": "The folder to write. \\[default: runs/NAME]",
    "frontend": "How texts become ids: auto, ngrams or bpe.",
    "vocabulary": "Rows of the embedding table.",
    "epochs": "Passes over the training data. \\[default: {lowest} to {highest}, by its size]",
    "patience": "Epochs without a lower validation loss before training stops.",
    "max_minutes": "Stop after this time; the weights then depend on the clock.",
    "dropout": "Drop probability wherever no rate is given below.",
    "embedding_dropout": "Drop probability after the embedding.",
    "attention_dropout": "Drop probability of attention weights.",
    "residual_dropout": "Drop probability of each residual branch.",
    "feed_forward_dropout": "Drop probability in the feed-forward, after its GELU.",
    "ngram_dropout": "Drop probability of single n-grams (front end ngrams).",
    "dropout_kind": "inverted scales in training, classic in eval mode.",
    "crop": "Share of rows of which an epoch reads a random piece.",
    "weight_decay": "Weight decay of AdamW, on the weights of linear layers.",
    "width": "Numbers in the vector of a position.",
    "layers": "Transformer blocks.",
    "heads": "Attention heads; a divisor of the width.",
    "feed_forward": "Inner width of the feed-forward. \\[default: twice the width]",
    "causal": "Let a position attend to itself and earlier ones only.",
    "arithmetic": "float32, or exact: the same bits on every machine.",
    "weight_bits": "Bits of a weight in exact arithmetic: 7 or 8.",
    "learning_rate": "Highest learning rate.",
    "batch_rows": "Rows of a batch, in each process.",
    "seed": "The same seed gives the same weights on the same machine.",
    "threads": "CPU threads; another number may give other bits.",
    "devices": "Devices on each node, with a process for each.",
    "nodes": "Nodes.",
    "strategy": "Lightning's strategy: auto, ddp, ...",
    "resume": "Continue an interrupted run of the same settings.",
    "overwrite": "Start again, and replace the training in --out.",
    "cache": f"Folder for the default data. \\[default: {CACHE}]",
}
# The default data is shared by all runs of a machine, so an environment may set its folder.
_VARIABLES = {"cache": "EVALMODE_CACHE"}


def train() -> None:
    """Train a transformer with dropout, and write a checkpoint for `evalmode export`."""


def train_command() -> Any:
    """The click command with its flags.

    It is built when it is called: an image that only serves has no model room to import.
    """
    from evalmode.model.config import DEFAULT_EPOCHS_MAX, DEFAULT_EPOCHS_MIN, TrainConfig

    types = get_type_hints(TrainConfig)
    types |= {"out": Path | None, "resume": bool, "overwrite": bool, "cache": Path | None}
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    defaults |= {"out": None, "resume": False, "overwrite": False, "cache": None}
    parameters = []
    for name, help_text in _HELP.items():
        if name == "epochs":
            help_text = help_text.format(lowest=DEFAULT_EPOCHS_MIN, highest=DEFAULT_EPOCHS_MAX)
        option = typer.Option(help=help_text, envvar=_VARIABLES.get(name))
        flag_type = types[name]
        # As a string, so that TrainConfig refuses a wrong word in one sentence. click would print
        # its usage as well.
        if get_origin(flag_type) is Literal:
            flag_type = str
        parameters.append(
            flag_parameter(name, Annotated[flag_type, option], default=defaults[name])
        )
    return command_of(_run, parameters, described_by=train, epilog=EPILOG)


def _run(
    *, out: Path | None, resume: bool, overwrite: bool, cache: Path | None, **options: Any
) -> None:
    """Train with `options` as the fields of TrainConfig, and print the result."""
    from evalmode.model.config import TrainConfig

    try:
        config = TrainConfig(**options)
    except ValueError as error:
        raise EvalmodeError(str(error)) from error

    # Imported after the configuration: a wrong value is refused before torch is imported.
    from evalmode.model.train import fit
    from evalmode.tables import data_tables, metrics_table, pairs_table

    console = open_console()
    result = fit(
        config,
        out=out or Path("runs") / Path(config.data).stem,
        resume=resume,
        overwrite=overwrite,
        cache=cache or Path(CACHE).expanduser(),
        console=console,
        show_data=lambda data: console.print(data_tables(data)),
    )
    # With several processes, only the first has a result.
    if result is None:
        return
    console.print(metrics_table(result.metrics))
    facts = {
        "checkpoint": result.checkpoint,
        "sha256 of the weights": result.weights_sha256,
        "parameters": f"{result.parameters:,}",
        "epochs": result.epochs,
        "seconds": f"{result.seconds:.0f}",
    }
    console.print(pairs_table(facts, title="training"))
