"""`evalmode compare`: the same texts under other settings, and how many answers differ in bits."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from evalmode.errors import EvalmodeError
from evalmode.terminal import EXIT_FINDINGS, open_console, write

EPILOG = (
    "Examples:  evalmode compare bundles/languages/1   |   "
    "evalmode compare bundles/languages/1 --provider cuda --texts texts.txt"
)


def compare(
    bundle: Annotated[Path, typer.Argument(help="A bundle or a folder of bundles.")] = Path(
        "bundles"
    ),
    provider: Annotated[
        list[str] | None,
        typer.Option(help="Compare this execution provider too; may be repeated."),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help=(
                'A file with a JSON string or {"text": ..., "id": ...} per line. With the suffix'
                " .txt each line is a text. - reads JSON lines from stdin."
                " \\[default: rows of the known answers]"
            )
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="The most rows to compare.")] = 512,
    require_same: Annotated[
        bool, typer.Option("--require-same", help="Exit 1 if any row has other bits.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run the same texts under other settings, and count the answers that differ in bits.

    The settings are levels of optimisation, threads, batch sizes, paddings, rounding modes of the
    processor, and providers. Exit 0, or with --require-same 1 if any row has other bits. Exit 2 if
    something cannot be used, such as a provider that is missing.
    """
    from evalmode.bundle.comparison import compare as compare_settings
    from evalmode.bundle.comparison import rows_of, settings_for
    from evalmode.bundle.store import find_bundle, open_bundle
    from evalmode.client.transfer import Source
    from evalmode.tables import comparisons_table

    opened = open_bundle(find_bundle(bundle))
    chosen_texts: list[str] = []
    if texts is not None:
        chosen_texts = Source(path=texts, flag="--texts").texts(most=rows)
    compared_rows = rows_of(opened, chosen_texts, count=rows)
    settings = settings_for(opened, provider or ())
    with open_console(stderr=True).status("comparing") as status:
        comparisons = compare_settings(
            opened,
            compared_rows,
            settings,
            progress=lambda setting: status.update(f"comparing: {setting}"),
        )

    if as_json:
        document = {
            "bundle": str(opened.path),
            "digest": opened.digest,
            "comparisons": [asdict(comparison) for comparison in comparisons],
        }
        write(json.dumps(document, indent=2) + "\n")
    else:
        open_console().print(comparisons_table(comparisons, title=f"{opened.path}"))
    for comparison in comparisons:
        if comparison.refusal:
            raise EvalmodeError(comparison.refusal)
    if require_same and any(comparison.differing for comparison in comparisons):
        raise typer.Exit(EXIT_FINDINGS)
