"""`evalmode show`: what a bundle declares, as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evalmode.terminal import open_console

EPILOG = "Example:  evalmode show bundles/languages/1"


def show(
    bundle: Annotated[Path, typer.Argument(help="A bundle or a folder of bundles.")] = Path(
        "bundles"
    ),
) -> None:
    """Show a bundle's manifest, certificate, dropout census and metrics.

    A bundle whose certificate is missing or did not pass is shown too.
    """
    from evalmode.bundle.store import find_bundle, open_bundle
    from evalmode.tables import bundle_tables

    open_console().print(bundle_tables(open_bundle(find_bundle(bundle), allow_uncertified=True)))
