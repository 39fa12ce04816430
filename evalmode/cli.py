"""The command `evalmode`: one subcommand a job. What a subcommand needs is imported when it is
called, not before.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from evalmode import __version__
from evalmode.commands import audit as audit_command
from evalmode.commands import export as export_command
from evalmode.commands import predict as predict_command
from evalmode.commands import serve as serve_command
from evalmode.commands import verify as verify_command
from evalmode.errors import EvalmodeError
from evalmode.terminal import UNUSABLE, complain, open_console


class _Commands(TyperGroup):
    """The subcommands; the one with a flag for every setting of a server gets them when it is
    called.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, serve_command.serve_command() if name == "serve" else command, rest


app = typer.Typer(
    cls=_Commands,
    help="Train with dropout. Serve without it. Prove it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)

# What a lean installation may lack, and the extra that brings it.
_EXTRAS = {
    "torch": "train",
    "lightning": "train",
    "datasets": "train",
    "safetensors": "train",
    "onnx": "export",
    "scipy": "export",
    "evalmode": "train,export",
}
BUNDLES = Path("bundles")


@app.command(
    epilog=(
        "Examples:  evalmode train   |   evalmode train --data reviews.csv --label-column stars"
        " --out runs/reviews"
    )
)
def train(
    data: Annotated[
        str, typer.Option(help="`languages`, or a CSV, TSV, JSONL or Parquet file.")
    ] = "languages",
    text_column: Annotated[
        str | None, typer.Option(help="The file's column of texts. \\[default: a usual name]")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Its column of labels. \\[default: a usual name]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write. \\[default: runs/NAME]")] = None,
    frontend: Annotated[str, typer.Option(help="auto, ngrams or bpe.")] = "auto",
    vocabulary: Annotated[int | None, typer.Option(help="Rows of the embedding table.")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Times to read the data. \\[default: by its size]")
    ] = None,
    patience: Annotated[
        int, typer.Option(help="Epochs without a better validation loss before it stops.")
    ] = 3,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop by the clock; bits then depend on it.")
    ] = None,
    dropout: Annotated[
        float, typer.Option(help="Drop probability wherever none is given below.")
    ] = 0.1,
    embedding_dropout: Annotated[float | None, typer.Option(help="After the embedding.")] = None,
    attention_dropout: Annotated[
        float | None, typer.Option(help="On the attention weights.")
    ] = None,
    residual_dropout: Annotated[float | None, typer.Option(help="On each residual branch.")] = None,
    feed_forward_dropout: Annotated[
        float | None, typer.Option(help="In the feed-forward, after its GELU.")
    ] = None,
    ngram_dropout: Annotated[
        float, typer.Option(help="On single n-grams (front end ngrams).")
    ] = 0.3,
    dropout_kind: Annotated[
        str, typer.Option(help="inverted, or classic (scales at test time).")
    ] = "inverted",
    crop: Annotated[
        float, typer.Option(help="Share of rows of which an epoch reads a random piece.")
    ] = 0.0,
    weight_decay: Annotated[
        float, typer.Option(help="AdamW's, on the weights of linear layers alone.")
    ] = 0.05,
    width: Annotated[int, typer.Option(help="Size of a position's vector.")] = 96,
    layers: Annotated[int, typer.Option(help="Transformer blocks.")] = 3,
    heads: Annotated[int, typer.Option(help="Attention heads; a divisor of the width.")] = 4,
    feed_forward: Annotated[
        int | None, typer.Option(help="Its inner size. \\[default: twice the width]")
    ] = None,
    causal: Annotated[
        bool, typer.Option(help="Let a position see itself and the past only.")
    ] = False,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    batch_rows: Annotated[int, typer.Option(help="Rows a batch, in each process.")] = 128,
    seed: Annotated[
        int, typer.Option(help="The same seed gives the same weights on the same machine.")
    ] = 0,
    threads: Annotated[
        int, typer.Option(help="CPU threads; other numbers may give other bits.")
    ] = 1,
    devices: Annotated[int, typer.Option(help="Devices (processes) on each node.")] = 1,
    nodes: Annotated[int, typer.Option(help="Nodes.")] = 1,
    strategy: Annotated[str, typer.Option(help="Lightning's name: auto, ddp, ...")] = "auto",
    resume: Annotated[
        bool, typer.Option(help="Go on where a killed run of the same settings stood.")
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(
            envvar="EVALMODE_CACHE", help="Keeps the default data. \\[default: ~/.cache/evalmode]"
        ),
    ] = None,
) -> None:
    """Train a transformer with dropout, and write a checkpoint that `evalmode export` takes."""
    # first of all: the parameters are the fields of TrainConfig, but for these three
    options = dict(locals())
    for other in ("out", "resume", "cache"):
        del options[other]
    from evalmode.model.config import TrainConfig

    try:
        config = TrainConfig(**options)
    except ValueError as error:
        raise EvalmodeError(str(error)) from error

    # after the configuration: nonsense need not wait for torch
    from evalmode.model.train import fit
    from evalmode.tables import metrics_table, pairs_table

    console = open_console()
    result = fit(
        config,
        out=out or Path("runs") / Path(data).stem,
        resume=resume,
        cache=cache or Path.home() / ".cache" / "evalmode",
        console=console,
    )
    if result is None:  # one of several processes, and not the first: that one tells
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


app.command(epilog=export_command.EPILOG)(export_command.export)
app.command(epilog=verify_command.EPILOG)(verify_command.verify)
app.command(epilog=audit_command.EPILOG)(audit_command.audit)
app.command(epilog=serve_command.EPILOG)(serve_command.serve)
app.command(epilog=predict_command.EPILOG)(predict_command.predict)


@app.command(epilog="Example:  evalmode show bundles/languages/1")
def show(
    bundle: Annotated[Path, typer.Argument(help="A bundle or a folder of bundles.")] = BUNDLES,
) -> None:
    """Show a bundle's manifest, certificate, dropout census and metrics; also of one that must not
    be served.
    """
    from evalmode.bundle.store import find_bundle, open_bundle
    from evalmode.tables import bundle_tables

    open_console().print(bundle_tables(open_bundle(find_bundle(bundle), allow_uncertified=True)))


def main() -> None:
    """Run the command line: the user's mistakes are one sentence on stderr and exit code 2, never a
    traceback.
    """
    # Threads that wait spinning starve their neighbours; read when torch is loaded, which no
    # command has done yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app()
    except EvalmodeError as error:
        complain(error)
        sys.exit(UNUSABLE)
    except OSError as error:  # a full disk, a closed pipe
        complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        sys.exit(UNUSABLE)
    except Exception as error:
        _explain(error)
        sys.exit(UNUSABLE)


def _explain(error: Exception) -> None:
    """A package that is missing, or a mistake of ours: a traceback and exit code 1 would read as a
    finding in CI.
    """
    missing = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    if extra := _EXTRAS.get(missing.partition(".")[0]):
        complain(f"this needs {missing}: pip install 'evalmode[{extra}]'")
    elif os.environ.get("EVALMODE_TRACEBACK"):
        raise error
    else:
        reason = " ".join(str(error).split())
        complain(
            f"a mistake of ours, {type(error).__name__}: {reason} (EVALMODE_TRACEBACK=1 shows"
            " where)"
        )


def _version(asked: bool) -> None:
    if asked:
        print(f"evalmode {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
