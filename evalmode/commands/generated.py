"""A command whose flags are made from the fields of a configuration when it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import typer

from evalmode.terminal import help_of


def command_of(
    call: Callable[..., None],
    parameters: Sequence[inspect.Parameter],
    *,
    described_by: Callable[..., object],
    epilog: str,
) -> Any:
    """The click command that calls `call` with these parameters as keywords.

    `described_by` is the function whose docstring is the help text.
    """
    call.__doc__ = help_of(described_by)
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command(epilog=epilog)(call)
    return typer.main.get_command(app)
