"""`evalmode verify`: ONNX files and bundles against the rules."""

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
    from collections.abc import Iterable

    from evalmode.export.verify.verify import Examined

EPILOG = (
    "Examples:  evalmode verify bundles models/*.onnx   |   evalmode verify models --format sarif"
    " --output evalmode.sarif   |   evalmode verify int8.onnx --inputs rows.npz"
)
# The value of --inputs for generated inputs.
MADE = "made"

# With fewer files the command ends before a progress bar could be read.
_TARGETS_FOR_A_BAR = 20


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
                "Run bare ONNX files too: on the arrays of a .npz file, on what"
                " package.module:sample_inputs returns, or on generated inputs (`made`)."
            ),
            show_default=False,
        ),
    ] = None,
    module: Annotated[
        str | None,
        typer.Option(
            help=(
                "package.module:factory of a module in eval mode, which the files must agree with."
            ),
            show_default=False,
        ),
    ] = None,
    time_limit: Annotated[
        float,
        typer.Option(help="Seconds that one file may run; a file that takes longer is unproven."),
    ] = 60,
    memory_limit: Annotated[
        int, typer.Option(help="MiB of memory that one file may take to run.")
    ] = 8192,
    form: reporting.Format = "text",
    output: reporting.Output = None,
    fail_on: reporting.FailOn = "unproven",
    allow_unproven: reporting.AllowUnproven = False,
    require_exact: Annotated[
        bool,
        typer.Option(
            "--require-exact", help="Exit 1 unless it is proved that nothing in a graph rounds."
        ),
    ] = False,
    ranges: Annotated[
        list[str] | None,
        typer.Option(
            "--range",
            help="NAME=LOW:HIGH of an integer input, for that proof; may be repeated.",
            show_default=False,
        ),
    ] = None,
    largest: Annotated[
        list[str] | None,
        typer.Option(
            help="AXIS=N, the largest size of a varying axis, for that proof; may be repeated.",
            show_default=False,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Leave this rule out; may be repeated.", show_default=False),
    ] = None,
) -> None:
    """Check ONNX files and bundles.

    Exit 0 when all pass, 1 when a rule finds something, 2 when a file is unreadable.
    """
    from rich.progress import track

    from evalmode.export.exact import statements
    from evalmode.export.report.report import FailOn, Report
    from evalmode.export.rules.registry import require_rule_names
    from evalmode.export.verify.guarded import load
    from evalmode.export.verify.in_parallel import examine_all
    from evalmode.export.verify.options import Limits, Options
    from evalmode.export.verify.targets import find_targets

    if module is not None and inputs is None:
        raise EvalmodeError("--module needs --inputs: without inputs nothing can be compared")
    options = Options(
        excluded=require_rule_names(exclude or ()),
        samples=None if inputs is None else _samples(inputs),
        module=module,
        limits=Limits(time_s=time_limit, memory_mib=memory_limit),
        exact=statements.Limits(
            ranges=dict(_range(text) for text in ranges or ()),
            largest=dict(_largest(text) for text in largest or ()),
        ),
    )
    if inputs is not None:
        # The module and the samples are loaded once here, so that an error in the user's code ends
        # the command. Otherwise it would become a finding on each file.
        load(options)

    targets = find_targets(paths)
    examined: Iterable[Examined] = examine_all(targets, options)
    stderr = open_console(stderr=True)
    if len(targets) >= _TARGETS_FOR_A_BAR and stderr.is_terminal:
        examined = track(examined, "verify", total=len(targets), console=stderr, transient=True)
    report = Report(
        examined=tuple(examined),
        fail_on=FailOn(fail_on),
        allow_unproven=allow_unproven,
        require_exact=require_exact,
    )
    reporting.finish(report, form, output)


def _samples(inputs: str) -> Sequence[Any] | str:
    """The samples that `--inputs` names.

    For a .npz file a list with its arrays, for the user's code the reference itself, and for `made`
    an empty sequence.
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


def _range(text: str) -> tuple[str, tuple[int, int]]:
    """A value of --range. Raises EvalmodeError for one that is written otherwise."""
    name, _, limits = text.rpartition("=")
    low, colon, high = limits.partition(":")
    try:
        if not name or not colon or int(low) > int(high):
            raise ValueError
        return name, (int(low), int(high))
    except ValueError:
        raise EvalmodeError(
            f"--range must be NAME=LOW:HIGH with two integers, the smaller first, got {text!r}"
        ) from None


def _largest(text: str) -> tuple[str, int]:
    """A value of --largest. Raises EvalmodeError for one that is written otherwise."""
    name, _, size = text.rpartition("=")
    if not name or not size.isdecimal() or int(size) < 1:
        raise EvalmodeError(f"--largest must be AXIS=N with an integer of at least 1, got {text!r}")
    return name, int(size)
