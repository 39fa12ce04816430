"""`evalmode export`: a checkpoint's folder or the user's own module, and the certificate as a
table. Knows no rule.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evalmode.errors import EvalmodeError
from evalmode.terminal import FOUND, open_console

if TYPE_CHECKING:
    from evalmode.export.release import Released
    from evalmode.export.rules.registry import Progress

EPILOG = (
    "Examples:  evalmode export runs/languages   |   evalmode export runs/mine --out /srv/bundles"
    " --version 2   |   evalmode export package.module:factory --inputs"
    " package.module:sample_inputs"
)


def export(
    source: Annotated[
        str,
        typer.Argument(
            help="The folder that `evalmode train` wrote, or package.module:factory of your module."
        ),
    ],
    inputs: Annotated[
        str | None,
        typer.Option(
            help=(
                "package.module:sample_inputs of your module: a mapping of input names, a tuple or"
                " a tensor, or a "
                "list of several, whose sizes show which axes vary."
            ),
            show_default=False,
        ),
    ] = None,
    dynamic_axes: Annotated[
        list[str] | None,
        typer.Option(
            help="INPUT=batch,length,_ names the axes of an input that vary; may be given again. "
            "\\[default: as the samples show]",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The bundle root.")] = Path("bundles"),
    name: Annotated[
        str | None,
        typer.Option(
            help="The bundle's name. \\[default: the checkpoint folder's or the factory's module's]"
        ),
    ] = None,
    version: Annotated[str, typer.Option(help="The bundle's version.")] = "1",
) -> None:
    """Export in eval mode, certify, and write a bundle; a certificate that does not pass writes
    nothing (exit 1).
    """
    from evalmode.export.release import ExportRefused
    from evalmode.tables import records_table

    console = open_console()
    named = name or _name_of(source)
    try:
        with console.status("export") as status:

            def progress(step: str) -> None:
                status.update(f"export: {step}")

            released = _release(
                source,
                inputs,
                dynamic_axes or [],
                root=out,
                name=named,
                version=version,
                progress=progress,
            )
    except ExportRefused as refused:
        console.print(records_table(refused.records, title="refused: no bundle was written"))
        raise typer.Exit(FOUND) from refused
    console.print(
        records_table(released.certificate.records, title=f"certificate of {released.path}")
    )
    console.print(f"digest {released.certificate.digest}", soft_wrap=True)


def _release(
    source: str, inputs: str | None, dynamic_axes: list[str], *, progress: Progress, **target: Any
) -> Released:
    from evalmode.export.inputs.references import is_reference

    if is_reference(source):
        if inputs is None:
            raise EvalmodeError(
                f"{source} needs --inputs package.module:sample_inputs, which it is called with"
            )
        from evalmode.export.from_module import release_module

        return release_module(
            source, inputs, dynamic_axes=dynamic_axes, progress=progress, **target
        )
    if inputs is not None or dynamic_axes:
        raise EvalmodeError(
            "--inputs and --dynamic-axes are for a package.module:factory; a checkpoint brings"
            " its own"
        )
    from evalmode.export.from_checkpoint import release_checkpoint
    from evalmode.model.checkpoint import load

    return release_checkpoint(load(Path(source)), progress=progress, **target)


def _name_of(source: str) -> str:
    from evalmode.export.inputs.references import is_reference

    module = source.partition(":")[0].rpartition(".")[2]
    stem = module if is_reference(source) else Path(source).resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")
