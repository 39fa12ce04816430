"""The routes of health: /livez and /v2/health/live, /readyz and /v2/health/ready."""

from __future__ import annotations

from fastapi import Request, Response

from evalmode.service.components import components_of
from evalmode.service.errors import NotReady, is_v2
from evalmode.service.http.body import JSON
from evalmode.service.protocol.metadata import ServerState


async def live(request: Request) -> Response:
    """Whether this process is healthy; 503 asks the orchestrator to restart it."""
    reason = components_of(request).health.live()
    if reason:
        raise NotReady(reason)
    return _response(request, ServerState(live=True))


async def ready(request: Request) -> Response:
    """Whether the server is ready for requests: it has started, no batch is stuck, and it is not
    stopping. A swap of a model changes nothing.
    """
    reason = components_of(request).health.ready()
    if reason:
        raise NotReady(reason)
    return _response(request, ServerState(live=True, ready=True))


def _response(request: Request, state: ServerState) -> Response:
    # Responses of /v2 leave fields out that are null, and those of our own routes contain them.
    body = state.model_dump_json(exclude_none=is_v2(request.scope["path"]))
    return Response(body, media_type=JSON)
