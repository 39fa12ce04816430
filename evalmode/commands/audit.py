"""`evalmode audit`: compares training with eval mode at each dropout of a module."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated

import typer

from evalmode.commands import reporting
from evalmode.errors import EvalmodeError
from evalmode.terminal import open_console

EPILOG = "Example:  evalmode audit package.module:factory --inputs package.module:sample_inputs"
# The value of --samples for which the audit chooses the number.
AUTO = "auto"
_MAX_SAMPLES = 1_000_000


def audit(
    factory: Annotated[
        str, typer.Argument(help="package.module:factory of the module.", show_default=False)
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
            help="Training forwards per site, or auto: enough to find the gaps that matter."
        ),
    ] = AUTO,
    alpha: Annotated[
        float, typer.Option(help="The highest probability of a false alarm at any site.")
    ] = 0.01,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31, help="The same seed gives the same audit.")
    ] = 0,
    form: reporting.Format = "text",
    output: reporting.Output = None,
    fail_on: reporting.FailOn = "unproven",
    allow_unproven: reporting.AllowUnproven = False,
) -> None:
    """Compare training with eval mode at every dropout of a module.

    Exit 0 without a gap, 1 when a site has one, 2 for input that cannot be used.
    """
    from evalmode.export.audit.audit import audit as audit_module
    from evalmode.export.inputs.references import load_module, load_samples
    from evalmode.export.inputs.samples import bind_samples
    from evalmode.export.report.report import FailOn, Report
    from evalmode.export.rules.registry import check_all
    from evalmode.export.rules.subject import Subject
    from evalmode.export.verify.verify import Verified
    from evalmode.tables import sites_table

    if not 0 < alpha < 1:
        raise EvalmodeError(f"--alpha must lie between 0 and 1, got {alpha:g}")
    draws = None
    if samples != AUTO:
        if not samples.isdecimal() or not 2 <= int(samples) <= _MAX_SAMPLES:
            raise EvalmodeError(
                f"--samples must be auto or a number from 2 to {_MAX_SAMPLES:,}, got {samples!r}"
            )
        draws = int(samples)

    module = load_module(factory)
    tensors, _ = bind_samples(module, load_samples(inputs))
    with open_console(stderr=True).status("audit") as status:
        result = audit_module(
            module,
            tensors,
            draws=draws,
            alpha=alpha,
            seed=seed,
            progress=lambda site: status.update(f"audit: {site}"),
        )
    if form == "text" and output is None:
        open_console().print(sites_table(result.sites))

    # The findings point to the file with the module's class, if it was defined in a file.
    try:
        source = Path(inspect.getfile(type(module)))
    except (TypeError, OSError):
        source = Path("module")
    records = check_all(Subject(audit=result))
    verified = Verified(path=Path(factory), file=source, records=records)
    report = Report(examined=(verified,), fail_on=FailOn(fail_on), allow_unproven=allow_unproven)
    reporting.finish(report, form, output)
