"""`evalmode healthcheck`: whether the server of this machine or container is ready."""

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
        typer.Option(help="Where the server is, if it is not to be found.", show_default=False),
    ] = None,
    timeout_s: Annotated[
        float, typer.Option(min=0.001, max=3600, help="The longest wait for its answer.")
    ] = DEFAULT_TIMEOUT_S,
) -> None:
    """Ask a server whether it is ready: exit 0 if it is, else 1 with one sentence.

    Without --url it finds the server that the same user started in the same environment, whatever
    flags it has. Where none is seen, it asks at EVALMODE_HOST and EVALMODE_PORT, or as the file of
    EVALMODE_CONFIG says. /readyz needs no API key, and the certificate is not verified: nothing
    secret is sent.
    """
    raise typer.Exit(check(url, timeout_s))
