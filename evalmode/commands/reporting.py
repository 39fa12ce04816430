"""The report of verify and audit: its flags, its format, its destination and the exit code."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from evalmode.errors import EvalmodeError
from evalmode.terminal import (
    EXIT_FINDINGS,
    EXIT_UNUSABLE,
    open_console,
    print_error,
    to_utf8,
    write,
)

if TYPE_CHECKING:
    from evalmode.export.report.report import Report

# The flags of every command with a report.
Format = Annotated[
    Literal["text", "json", "sarif", "junit", "github"],
    typer.Option("--format", help="Format of the report."),
]
Output = Annotated[
    Path | None, typer.Option(help="Write the report to this file. \\[default: stdout]")
]
FailOn = Annotated[
    Literal["unproven", "warning"],
    typer.Option(help="The mildest finding that makes the exit code 1."),
]
AllowUnproven = Annotated[
    bool, typer.Option("--allow-unproven", help="Exit 0 although something is unproven.")
]


def finish(report: Report, form: str, output: Path | None) -> None:
    """Print the report in the format `form`, or write it to `output`, and set the exit code.

    Raises typer.Exit with 2 if a file was unreadable, and otherwise with 1 if a rule does not hold.
    Returns if all rules hold.
    """
    from evalmode.export.report.report import plain

    for file in report.unreadable:
        print_error(plain(file.why))

    if form == "text" and output is None:
        from evalmode.export.report import text

        console = open_console()
        # stderr has the reasons already.
        for line in text.lines(report, reasons=False):
            console.print(line, soft_wrap=True)
    else:
        rendered = import_module(f"evalmode.export.report.{form}").render(report)
        if output is None:
            write(rendered)
        else:
            from evalmode.atomic_files import write_file

            try:
                write_file(output, to_utf8(rendered))
            except OSError as error:
                raise EvalmodeError(
                    f"no report can be written to {output}: {error.strerror}"
                ) from error
            open_console().print(
                f"{report.summary}; the report is in {plain(str(output))}",
                soft_wrap=True,
                markup=False,
                highlight=False,
            )

    if report.unreadable:
        raise typer.Exit(EXIT_UNUSABLE)
    if not report.holds:
        raise typer.Exit(EXIT_FINDINGS)
