"""The command `evalmode`: its subcommands, and the exit code and sentence of every error."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from evalmode import __version__
from evalmode.commands import audit as audit_command
from evalmode.commands import compare as compare_command
from evalmode.commands import export as export_command
from evalmode.commands import healthcheck as healthcheck_command
from evalmode.commands import predict as predict_command
from evalmode.commands import serve as serve_command
from evalmode.commands import show as show_command
from evalmode.commands import train as train_command
from evalmode.commands import verify as verify_command
from evalmode.errors import EvalmodeError
from evalmode.terminal import EXIT_UNUSABLE, help_of, print_error

# Commands whose flags are the fields of a configuration. They are built when they are called, so
# that another command does not import the configuration.
_GENERATED = {"serve": serve_command.serve_command, "train": train_command.train_command}


class _Commands(TyperGroup):
    """The group of subcommands, which builds the generated ones."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in _GENERATED:
            command = _GENERATED[name]()
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EOFError as error:
            # click would print "Aborted." and exit with 1, the code of a finding.
            raise EvalmodeError(f"a file ends too early: {error or 'it is empty'}") from error


app = typer.Typer(
    cls=_Commands,
    help="Train with dropout. Serve without it. Prove it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)

# Packages that a lean installation lacks, and the extra that installs each.
_EXTRAS = {
    "torch": "train",
    "lightning": "train",
    "pyarrow": "train",
    "safetensors": "train",
    "onnx": "export",
    "scipy": "export",
    # A room that the serving image removed.
    "evalmode": "train,export",
}

for command, epilog in (
    (train_command.train, train_command.EPILOG),
    (export_command.export, export_command.EPILOG),
    (verify_command.verify, verify_command.EPILOG),
    (audit_command.audit, audit_command.EPILOG),
    (serve_command.serve, serve_command.EPILOG),
    (healthcheck_command.healthcheck, healthcheck_command.EPILOG),
    (predict_command.predict, predict_command.EPILOG),
    (show_command.show, show_command.EPILOG),
    (compare_command.compare, compare_command.EPILOG),
):
    app.command(help=help_of(command), epilog=epilog)(command)


def main() -> None:
    """Run the command line. Every error is one sentence on stderr and exit code 2.

    Python's own way, a traceback and exit code 1, would read as a finding in CI.
    EVALMODE_TRACEBACK=1 shows the traceback of an internal error.
    """
    # OpenMP's waiting threads would otherwise spin, and take the CPU from other processes. torch
    # reads this when it is imported, which no command has done yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app()
    except EvalmodeError as error:
        print_error(error)
        sys.exit(EXIT_UNUSABLE)
    except OSError as error:  # a full disk, a closed pipe
        sentence = error.strerror or str(error)
        if error.filename:
            sentence += f": {error.filename}"
        print_error(sentence)
        sys.exit(EXIT_UNUSABLE)
    except Exception as error:
        package = ""
        if isinstance(error, ModuleNotFoundError) and error.name:
            package = error.name.partition(".")[0]
        if package in _EXTRAS:
            print_error(f"this needs {error.name}: pip install 'evalmode[{_EXTRAS[package]}]'")  # type: ignore[attr-defined]
        elif os.environ.get("EVALMODE_TRACEBACK"):
            raise
        else:
            reason = " ".join(str(error).split())
            print_error(
                f"internal error, {type(error).__name__}: {reason} (EVALMODE_TRACEBACK=1 shows"
                " where)"
            )
        sys.exit(EXIT_UNUSABLE)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"evalmode {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
