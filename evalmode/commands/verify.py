"""`evalmode verify`: which files, by which rules, on which inputs; and a bar while it takes long.
Knows no rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zipfile import BadZipFile

import typer

from evalmode.commands import reporting
from evalmode.errors import EvalmodeError
from evalmode.terminal import open_console

if TYPE_CHECKING:
    from evalmode.export.verify.options import Options
    from evalmode.export.verify.targets import Target
    from evalmode.export.verify.verify import Examined

EPILOG = (
    "Examples:  evalmode verify bundles models/*.onnx   |   evalmode verify models --format sarif"
    " --output evalmode.sarif   |   evalmode verify int8.onnx --inputs rows.npz"
)
MADE = "made"

_BAR_FROM = 20  # targets


def verify(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="ONNX files, bundles, and folders that are searched for both.", show_default=False
        ),
    ],
    inputs: Annotated[
        str | None,
        typer.Option(
            help=(
                "Run bare files too, on the arrays of a .npz file, on what"
                " package.module:sample_inputs returns, or "
                "on `made` ones."
            ),
            show_default=False,
        ),
    ] = None,
    module: Annotated[
        str | None,
        typer.Option(
            help=(
                "package.module:factory of the module, in eval mode, that the files should answer"
                " like."
            ),
            show_default=False,
        ),
    ] = None,
    time_limit: Annotated[
        float,
        typer.Option(help="Seconds that one file may run; one that takes longer is unproven."),
    ] = 60,
    memory_limit: Annotated[
        int, typer.Option(help="MiB of memory that one file may take to run.")
    ] = 8192,
    form: reporting.Format = "text",
    output: reporting.Output = None,
    fail_on: reporting.FailOn = "unproven",
    allow_unproven: reporting.AllowUnproven = False,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Leave this rule out; may be given again.", show_default=False),
    ] = None,
) -> None:
    """Check ONNX files and bundles: exit 0 when all pass, 1 when a rule finds something, 2 when one
    is unreadable.
    """
    from evalmode.export.report.report import FailOn, Report
    from evalmode.export.rules.registry import require_rule_names
    from evalmode.export.verify.guarded import load
    from evalmode.export.verify.options import Limits, Options
    from evalmode.export.verify.targets import find_targets

    if module is not None and inputs is None:
        raise EvalmodeError("--module needs --inputs: without inputs nothing can be compared")
    options = Options(
        excluded=require_rule_names(exclude or ()),
        samples=None if inputs is None else _samples(inputs),
        module=module,
        limits=Limits(time_s=time_limit, memory_mib=memory_limit),
    )
    if inputs is not None:
        load(options)  # a mistake in the user's own code is no verdict on any file
    examined = _examine(find_targets(paths), options)
    report = Report(examined=examined, fail_on=FailOn(fail_on), allow_unproven=allow_unproven)
    reporting.finish(report, form, output)


def _examine(targets: Sequence[Target], options: Options) -> tuple[Examined, ...]:
    from rich.progress import track

    from evalmode.export.verify.in_parallel import examine_all

    found = examine_all(targets, options)
    terminal = open_console(stderr=True)
    if len(targets) < _BAR_FROM or not terminal.is_terminal:
        return tuple(found)
    return tuple(track(found, "verify", total=len(targets), console=terminal, transient=True))


def _samples(inputs: str) -> Sequence[Any] | str:
    """What --inputs means: arrays of a file, the reference of the user's code, or none, which asks
    for made ones.
    """
    if inputs == MADE:
        return ()
    if ":" in inputs and not Path(inputs).exists():
        return inputs
    import numpy as np

    try:
        with np.load(inputs, allow_pickle=False) as arrays:
            return [dict(arrays)]
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise EvalmodeError(f"{inputs} cannot be read as a .npz file of arrays: {error}") from error
