"""`evalmode audit`: the user's module, site by site, as a table or as a report. Knows no rule."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evalmode.commands import reporting
from evalmode.errors import EvalmodeError
from evalmode.terminal import open_console

if TYPE_CHECKING:
    from evalmode.export.audit.audit import Audit

EPILOG = "Example:  evalmode audit package.module:factory --inputs package.module:sample_inputs"
AUTO = "auto"
_MOST = 1_000_000


def audit(
    factory: Annotated[
        str, typer.Argument(help="package.module:factory of your module.", show_default=False)
    ],
    inputs: Annotated[
        str,
        typer.Option(
            help=(
                "package.module:sample_inputs: a mapping of input names, a tuple or a tensor, or a"
                " list of several."
            ),
            show_default=False,
        ),
    ],
    samples: Annotated[
        str,
        typer.Option(
            help="Training forwards for each site, or auto: as many as find the gaps that matter."
        ),
    ] = AUTO,
    alpha: Annotated[
        float, typer.Option(help="Bounds the probability of any false alarm at all.")
    ] = 0.01,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31, help="The same seed gives the same audit.")
    ] = 0,
    form: reporting.Format = "text",
    output: reporting.Output = None,
    fail_on: reporting.FailOn = "unproven",
    allow_unproven: reporting.AllowUnproven = False,
) -> None:
    """Hold every dropout's training against its eval: exit 0 without a gap, 1 when a site has one,
    2 for bad input.
    """
    from evalmode.export.inputs.references import load_module
    from evalmode.export.report.report import FailOn, Report
    from evalmode.export.rules.registry import check_all
    from evalmode.export.rules.subject import Subject
    from evalmode.export.verify.verify import Verified
    from evalmode.tables import sites_table

    if not 0 < alpha < 1:
        raise EvalmodeError(f"--alpha must lie between 0 and 1, got {alpha:g}")
    draws = _draws(samples)
    module = load_module(factory)
    found = _audit(module, inputs, draws=draws, alpha=alpha, seed=seed)
    if form == "text" and output is None:
        open_console().print(sites_table(found.sites))
    records = check_all(Subject(audit=found))
    verified = Verified(path=Path(factory), file=_source_of(module), records=records)
    report = Report(examined=(verified,), fail_on=FailOn(fail_on), allow_unproven=allow_unproven)
    reporting.finish(report, form, output)


def _draws(samples: str) -> int | None:
    if samples == AUTO:
        return None
    if not samples.isdecimal() or not 2 <= int(samples) <= _MOST:
        raise EvalmodeError(
            f"--samples must be auto or a number from 2 to {_MOST:,}, got {samples!r}"
        )
    return int(samples)


def _audit(module: Any, inputs: str, **options: Any) -> Audit:
    from evalmode.export.audit.audit import audit as audit_module
    from evalmode.export.inputs.references import load_samples
    from evalmode.export.inputs.samples import bind_samples

    samples, _ = bind_samples(module, load_samples(inputs))
    with open_console(stderr=True).status("audit") as status:
        return audit_module(
            module, samples, progress=lambda site: status.update(f"audit: {site}"), **options
        )


def _source_of(module: Any) -> Path:
    """The file that a report points to: where the module's class is written."""
    try:
        return Path(inspect.getfile(type(module)))
    except (TypeError, OSError):  # a class that was made in no file
        return Path("module")
