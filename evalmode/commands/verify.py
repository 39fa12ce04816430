"""`evalmode verify`: ONNX files and bundles against the rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zipfile import BadZipFile

import typer

from evalmode.commands import reporting
from evalmode.errors import EvalmodeError
from evalmode.terminal import open_console

if TYPE_CHECKING:
    from collections.abc import Iterable

    from evalmode.export.exact.limits import Range
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
            help=(
                "For that proof: NAME=LOW:HIGH of an integer input, or NAME=LOW:HIGH/STEP of a"
                " float32 input whose numbers are multiples of a power of two, such as"
                " x=-1:1/2^-8. May be repeated."
            ),
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

    from evalmode.export.exact import limits as exact_limits
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
        exact=exact_limits.Limits(
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


def _range(text: str) -> tuple[str, Range]:
    """A value of --range. Raises EvalmodeError for one that is written otherwise."""
    from evalmode.export.exact.limits import FloatRange

    name, _, limits = text.rpartition("=")
    numbers, slash, step_text = limits.partition("/")
    low_text, colon, high_text = numbers.partition(":")
    try:
        low, high = Fraction(low_text), Fraction(high_text)
        if slash:
            grid = _exponent(step_text)
        elif low.denominator == high.denominator == 1:
            grid = None
        else:
            raise ValueError
        if not name or not colon or low > high:
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise EvalmodeError(
            "--range must be NAME=LOW:HIGH with two integers, the smaller first, or for a float32"
            f" input NAME=LOW:HIGH/STEP with a power of two, such as x=-1:1/2^-8, got {text!r}"
        ) from None
    if grid is None:
        return name, (int(low), int(high))
    # The multiples of the step that are within the limits.
    step = Fraction(2) ** grid
    first, last = math.ceil(low / step), math.floor(high / step)
    return name, FloatRange(low=float(first * step), high=float(last * step), grid=grid)


def _exponent(text: str) -> int:
    """The exponent of a power of two that is written as 2^-8, 0.5 or 4. Raises ValueError."""
    base, caret, exponent = text.partition("^")
    if caret:
        if base != "2" or abs(int(exponent)) > 126:  # the exponents of float32
            raise ValueError
        return int(exponent)
    fraction, exponent_of_two = math.frexp(float(text))
    if fraction != 0.5:
        raise ValueError
    return exponent_of_two - 1


def _largest(text: str) -> tuple[str, int]:
    """A value of --largest. Raises EvalmodeError for one that is written otherwise."""
    name, _, size = text.rpartition("=")
    if not name or not size.isdecimal() or int(size) < 1:
        raise EvalmodeError(f"--largest must be AXIS=N with an integer of at least 1, got {text!r}")
    return name, int(size)
