"""The routes of health: /livez and /v2/health/live, /readyz and /v2/health/ready."""

from __future__ import annotations

from fastapi import Request, Response

from evalmode.service.components import components_of
from evalmode.service.errors import NotReady, is_v2
from evalmode.service.http.body import JSON
from evalmode.service.protocol.metadata import ServerState


async def live(request: Request) -> Response:
    """Whether this process should go on; 503 asks for a restart."""
    if reason := components_of(request).health.live():
        raise NotReady(reason)
    return _answer(request, ServerState(live=True))


async def ready(request: Request) -> Response:
    """Whether predictions can be asked: known answers came out, no batch is stuck, and the end is
    not near.
    """
    if reason := components_of(request).health.ready():
        raise NotReady(reason)
    return _answer(request, ServerState(live=True, ready=True))


def _answer(request: Request, state: ServerState) -> Response:
    # The answers of /v2 leave out what is null; those of our own routes hold it.
    body = state.model_dump_json(exclude_none=is_v2(request.scope["path"]))
    return Response(body, media_type=JSON)
