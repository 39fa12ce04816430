"""`evalmode train`: a flag for each field of a training's configuration that has a help text here.

Types and defaults are those of `evalmode.model.config.TrainConfig`.
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import typer

from evalmode import CACHE
from evalmode.commands.generated import command_of
from evalmode.errors import EvalmodeError
from evalmode.terminal import open_console

EPILOG = (
    "Examples:  evalmode train   |   evalmode train --data reviews.csv --label-column stars"
    " --out runs/reviews"
)
_HELP = {
    "data": "`languages`, or a CSV, TSV, JSONL or Parquet file.",
    "text_column": "The file's column of texts. \\[default: a usual name]",
    "label_column": "Its column of labels. \\[default: a usual name]",
    "separator": "What separates columns of a CSV or TSV file, such as ';' or tab.",
    "out": "Where to write. \\[default: runs/NAME]",
    "frontend": "auto, ngrams or bpe.",
    "vocabulary": "Rows of the embedding table.",
    "epochs": "Times to read the data. \\[default: by its size]",
    "patience": "Epochs without a better validation loss before it stops.",
    "max_minutes": "Stop by the clock; bits then depend on it.",
    "dropout": "Drop probability wherever none is given below.",
    "embedding_dropout": "After the embedding.",
    "attention_dropout": "On the attention weights.",
    "residual_dropout": "On each residual branch.",
    "feed_forward_dropout": "In the feed-forward, after its GELU.",
    "ngram_dropout": "On single n-grams (front end ngrams).",
    "dropout_kind": "inverted, or classic (scales at test time).",
    "crop": "Share of rows of which an epoch reads a random piece.",
    "weight_decay": "AdamW's, on the weights of linear layers alone.",
    "width": "Size of a position's vector.",
    "layers": "Transformer blocks.",
    "heads": "Attention heads; a divisor of the width.",
    "feed_forward": "Its inner size. \\[default: twice the width]",
    "causal": "Let a position see itself and the past only.",
    "learning_rate": "Peak learning rate.",
    "batch_rows": "Rows a batch, in each process.",
    "seed": "The same seed gives the same weights on the same machine.",
    "threads": "CPU threads; other numbers may give other bits.",
    "devices": "Devices (processes) on each node.",
    "nodes": "Nodes.",
    "strategy": "Lightning's name: auto, ddp, ...",
    "resume": "Go on where a killed run of the same settings stood.",
    "overwrite": "Begin anew in place of the training in --out.",
    "cache": f"Keeps the default data. \\[default: {CACHE}]",
}


def train() -> None:
    """Train a transformer with dropout, and write a checkpoint that `evalmode export` takes."""


def train_command() -> Any:
    """The command with its flags.

    It is made when it is called: an image that only serves has no model room.
    """
    from evalmode.model.config import TrainConfig

    types = get_type_hints(TrainConfig) | {
        "out": Path | None,
        "resume": bool,
        "overwrite": bool,
        "cache": Path | None,
    }
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    defaults |= {"out": None, "resume": False, "overwrite": False, "cache": None}
    parameters = []
    for name, help_text in _HELP.items():
        # A Literal stays a str: TrainConfig refuses another value with a sentence of its own.
        kind = str if get_origin(types[name]) is Literal else types[name]
        option = typer.Option(help=help_text, envvar="EVALMODE_CACHE" if name == "cache" else None)
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults[name],
                annotation=Annotated[kind, option],
            )
        )

    def call(
        out: Path | None, resume: bool, overwrite: bool, cache: Path | None, **options: Any
    ) -> None:
        _train(options, out=out, resume=resume, overwrite=overwrite, cache=cache)

    return command_of(call, parameters, described_by=train, epilog=EPILOG)


def _train(
    options: dict[str, Any],
    *,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    cache: Path | None,
) -> None:
    from evalmode.model.config import TrainConfig

    try:
        config = TrainConfig(**options)
    except ValueError as error:
        raise EvalmodeError(str(error)) from error

    # Imported after the configuration: a value that is refused need not wait for torch.
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
    if result is None:  # one of several processes: the first prints the result
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
