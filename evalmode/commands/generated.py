"""Builds a command whose flags come from the fields of a configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import typer

from evalmode.terminal import help_of


def flag_parameter(name: str, annotation: Any, *, default: object) -> inspect.Parameter:
    """The parameter of one flag.

    `annotation` is Annotated[type, typer.Option(...)], or the same with typer.Argument.
    """
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def command_of(
    call: Callable[..., None],
    parameters: Sequence[inspect.Parameter],
    *,
    described_by: Callable[..., object],
    epilog: str,
) -> Any:
    """The click command that calls `call` with the values of `parameters` as keywords.

    The docstring of `described_by` is the help text.
    """

    def run(**values: Any) -> None:
        call(**values)

    # Typer 0.29 reads the flags from a function's signature, and has no other way to declare them.
    run.__doc__ = help_of(described_by)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command(epilog=epilog)(run)
    return typer.main.get_command(app)
