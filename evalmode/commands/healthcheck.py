"""`evalmode healthcheck`: whether the server of this machine or container is ready.

`evalmode/__main__.py` runs `evalmode healthcheck` without flags before Typer is imported.
"""

from __future__ import annotations

from typing import Annotated

import typer

from evalmode.client.readiness import DEFAULT_TIMEOUT_S, check

EPILOG = (
    "Examples:  evalmode healthcheck   |   evalmode healthcheck --url https://localhost:8443"
    '   |   in a Dockerfile: HEALTHCHECK CMD \\["evalmode", "healthcheck"]'
)


def healthcheck(
    url: Annotated[
        str | None,
        typer.Option(
            help="The server's address. Default: the local server is found automatically.",
            show_default=False,
        ),
    ] = None,
    timeout_s: Annotated[
        float, typer.Option(min=0.001, max=3600, help="Seconds to wait for the answer.")
    ] = DEFAULT_TIMEOUT_S,
) -> None:
    """Ask a server whether it is ready: exit 0 if it is, else 1 with one sentence.

    Without --url it asks the server that the same user started in the same environment, whatever
    its flags. If there is none, it asks at EVALMODE_HOST and EVALMODE_PORT, or at the address in
    the file EVALMODE_CONFIG. /readyz needs no API key. The certificate is not verified, since
    nothing secret is sent.
    """
    raise typer.Exit(check(url, timeout_s))
