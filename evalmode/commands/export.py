"""`evalmode export`: a certified bundle from a checkpoint or from the user's module."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from evalmode.errors import EvalmodeError
from evalmode.terminal import EXIT_FINDINGS, open_console

EPILOG = (
    "Examples:  evalmode export runs/languages   |   evalmode export runs/mine --out /srv/bundles"
    " --version 2   |   evalmode export package.module:factory --inputs"
    " package.module:sample_inputs"
)


def export(
    source: Annotated[
        str,
        typer.Argument(
            help="The folder that `evalmode train` wrote, or package.module:factory of a module."
        ),
    ],
    inputs: Annotated[
        str | None,
        typer.Option(
            help=(
                "package.module:sample_inputs of the module: a mapping of input names, a tuple or a"
                " tensor, or a list of several, whose sizes show which axes vary."
            ),
            show_default=False,
        ),
    ] = None,
    dynamic_axes: Annotated[
        list[str] | None,
        typer.Option(
            help="INPUT=batch,length,_ names the axes of an input that vary; may be repeated. "
            "\\[default: as the samples show]",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of bundles.")] = Path("bundles"),
    name: Annotated[
        str | None,
        typer.Option(
            help="The bundle's name. \\[default: the checkpoint's folder, or the factory's module]"
        ),
    ] = None,
    version: Annotated[str, typer.Option(help="The bundle's version.")] = "1",
    kernels: Annotated[
        str,
        typer.Option(
            help=(
                "float, or integer: the matrix products of an exact network in 8-bit integers, with"
                " the same bits."
            )
        ),
    ] = "float",
) -> None:
    """Export in eval mode, certify, and write a bundle.

    A certificate that does not pass writes nothing (exit 1).
    """
    from evalmode.export.inputs.references import is_reference
    from evalmode.export.release import ExportRefused
    from evalmode.tables import records_table, statements_table

    if kernels not in ("float", "integer"):
        raise EvalmodeError(f"--kernels must be float or integer, got {kernels!r}")
    is_module = is_reference(source)
    if not name:
        # The last part of the factory's module, or the name of the checkpoint's folder.
        if is_module:
            source_name = source.partition(":")[0].rpartition(".")[2]
        else:
            source_name = Path(source).resolve().name
        # Without the characters that a bundle's name cannot have.
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", source_name).strip("-._")

    console = open_console()
    try:
        with console.status("export") as status:

            def progress(step: str) -> None:
                status.update(f"export: {step}")

            if is_module:
                if inputs is None:
                    raise EvalmodeError(
                        f"{source} needs --inputs package.module:sample_inputs to call it with"
                    )
                if kernels != "float":
                    raise EvalmodeError(
                        "--kernels integer is for the checkpoint of an exact network, and not for a"
                        " package.module:factory"
                    )
                from evalmode.export.from_module import release_module

                release = release_module(
                    source,
                    inputs,
                    dynamic_axes=dynamic_axes or [],
                    root=out,
                    name=name,
                    version=version,
                    progress=progress,
                )
            else:
                if inputs is not None or dynamic_axes:
                    raise EvalmodeError(
                        "--inputs and --dynamic-axes are for a package.module:factory; a checkpoint"
                        " brings its own"
                    )
                from evalmode.export.from_checkpoint import release_checkpoint
                from evalmode.model.checkpoint import load

                release = release_checkpoint(
                    load(Path(source)),
                    root=out,
                    name=name,
                    version=version,
                    progress=progress,
                    kernels=kernels,
                )
    except ExportRefused as refusal:
        console.print(records_table(refusal.records, title="refused: no bundle was written"))
        raise typer.Exit(EXIT_FINDINGS) from refusal
    console.print(
        records_table(release.certificate.records, title=f"certificate of {release.path}")
    )
    console.print(statements_table(release.certificate.statements))
    console.print(f"digest {release.certificate.digest}", soft_wrap=True)
