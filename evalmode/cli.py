"""The command `evalmode`: its subcommands, and what an error becomes."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from evalmode import __version__
from evalmode.commands import audit as audit_command
from evalmode.commands import export as export_command
from evalmode.commands import healthcheck as healthcheck_command
from evalmode.commands import predict as predict_command
from evalmode.commands import serve as serve_command
from evalmode.commands import show as show_command
from evalmode.commands import train as train_command
from evalmode.commands import verify as verify_command
from evalmode.errors import EvalmodeError
from evalmode.terminal import UNUSABLE, complain, help_of

# Commands whose flags are the fields of a configuration: made when they are called.
_MADE_WHEN_CALLED = {"serve": serve_command.serve_command, "train": train_command.train_command}


class _Commands(TyperGroup):
    """The subcommands, those with generated flags included."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        make = _MADE_WHEN_CALLED.get(name or "")
        return name, make() if make else command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EOFError as error:  # click would print "Aborted." and exit with 1, as a finding does
            raise EvalmodeError(f"a file ends too early: {error or 'it is empty'}") from error


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
    "pyarrow": "train",
    "safetensors": "train",
    "onnx": "export",
    "scipy": "export",
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
):
    app.command(help=help_of(command), epilog=epilog)(command)


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


def _version(show: bool) -> None:
    if show:
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
