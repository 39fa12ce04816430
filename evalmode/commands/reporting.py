"""How a command's report leaves it: the formats, the file or the terminal, and the exit code. Knows
no rule.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from evalmode.errors import EvalmodeError
from evalmode.terminal import FOUND, UNUSABLE, complain, encoded, open_console, write

if TYPE_CHECKING:
    from evalmode.export.report.report import Report

# The flags that every command with a report has.
Format = Annotated[
    Literal["text", "json", "sarif", "junit", "github"],
    typer.Option("--format", help="How the report is written."),
]
Output = Annotated[
    Path | None, typer.Option(help="Write the report into this file. \\[default: stdout]")
]
FailOn = Annotated[
    Literal["unproven", "warning"], typer.Option(help="The least that makes the exit code 1.")
]
AllowUnproven = Annotated[
    bool, typer.Option("--allow-unproven", help="Exit 0 for what is not proven.")
]


def finish(report: Report, form: str, output: Path | None) -> None:
    """Tell what was found and end the command: by returning when all is well, else by typer.Exit
    with 1 or 2.
    """
    from evalmode.export.report.report import plain

    for one in report.unreadable:
        complain(plain(one.why))
    _tell(report, form, output)
    if report.unreadable:
        raise typer.Exit(UNUSABLE)
    if not report.holds:
        raise typer.Exit(FOUND)


def _tell(report: Report, form: str, output: Path | None) -> None:
    from evalmode.export.report.report import plain

    if form == "text" and output is None:
        from evalmode.export.report import text

        out = open_console()
        for line in text.lines(report, reasons=False):  # stderr has the reasons
            out.print(line, soft_wrap=True)
        return
    spelled = import_module(f"evalmode.export.report.{form}").render(report)
    if output is None:
        write(spelled)
        return
    from evalmode.atomic_files import write_file

    try:
        write_file(output, encoded(spelled))
    except OSError as error:
        raise EvalmodeError(f"no report can be written to {output}: {error.strerror}") from error
    open_console().print(
        f"{report.summary}; the report is in {plain(str(output))}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
