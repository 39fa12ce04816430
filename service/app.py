"""The HTTP application: its routes, what stands around them, and one shape for every error. Knows
no ONNX, no batching.

`create_app(components)` builds it; importing this file does nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import structlog
from fastapi import APIRouter, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import evalmode
from evalmode.service.components import Components, components_of
from evalmode.service.errors import (
    BodyTooLarge,
    QueueFull,
    RequestError,
    RequestTimeout,
    RunFailed,
    UnsupportedMedia,
    error_body,
    is_v2,
)
from evalmode.service.health import Stage
from evalmode.service.http import docs, health, v1, v2
from evalmode.service.http.api_keys import requires_key
from evalmode.service.http.body import JSON
from evalmode.service.http.middleware import CLIENT_CLOSED_REQUEST, add_middleware
from evalmode.service.http.streams import Streams
from evalmode.service.http.v1_schemas import ErrorResponse
from evalmode.service.protocol.metadata import ServerState
from evalmode.service.strict_json import SHOWN_CHARACTERS

_log = structlog.get_logger("evalmode.service")


class _Application(FastAPI):
    """FastAPI with API keys, where the settings have some, in its OpenAPI schema."""

    def openapi(self) -> dict[str, Any]:
        """The schema of all routes."""
        schema = super().openapi()
        if requires_key(self.state.components.settings):
            docs.describe_keys(schema)
        return schema


def create_app(components: Components) -> FastAPI:
    """The application of these parts. When it stops it answers what was accepted, and closes
    them.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        measuring = asyncio.create_task(components.metrics.measure_loop_lag())
        yield
        measuring.cancel()
        await asyncio.to_thread(components.close)

    app = _Application(
        title="evalmode",
        summary="Predictions of a model that was proven to be in eval mode.",
        version=evalmode.__version__,
        # FastAPI's pages load their scripts from a CDN: nothing for a server without a way out
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect answers no POST, and is no error in our form
        lifespan=lifespan,
    )
    app.state.components = components
    app.state.repository_lock = asyncio.Lock()
    app.state.streams = Streams(
        components.engine,
        parallel=components.engine.load.parallel,
        max_line_bytes=components.settings.max_body_bytes,
        silence_s=components.settings.body_timeout_s,
        queue_rows=components.settings.queue_rows,
        draining=lambda: components.health.stage is Stage.DRAINING,
        drain_s=components.settings.drain_s,
    )
    app.include_router(v1.routes(components.settings))
    app.include_router(v2.routes(components.settings))
    app.include_router(_routes(components))
    if components.settings.docs:
        docs.mount(app)
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    add_middleware(app, components.settings, components.metrics, tracing=components.tracing)
    return app


def _routes(components: Components) -> APIRouter:
    router = APIRouter(generate_unique_id_function=lambda route: route.name)
    not_so: dict[int | str, dict[str, Any]] = {503: {"model": ErrorResponse}}
    for name, answer in (("livez", health.live), ("readyz", health.ready)):
        router.add_api_route(
            f"/{name}", answer, name=name, response_model=ServerState, responses=not_so
        )
    if components.settings.metrics:
        router.add_api_route("/metrics", _metrics, name="metrics", response_class=Response)
    return router


async def _metrics(request: Request) -> Response:
    """The server's figures, for Prometheus."""
    components = components_of(request)
    # In a thread: with several workers it reads the files of all of them.
    body, content_type = await asyncio.to_thread(
        components.metrics.render, request.headers.get("accept", ""), load=components.engine.load
    )
    return Response(body, headers={"content-type": content_type})


def _error(
    request: Request,
    status: int,
    sentence: str,
    *,
    field: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    if status == 500:  # what its caller may ask us about
        sentence = (
            f"{sentence}; request {request.scope.get('state', {}).get('request_id', 'unknown')}"
        )
    path = request.scope["path"]
    if status == 422 and is_v2(path):
        status = 400  # the Open Inference Protocol has one status for whatever is wrong
    body = error_body(path, sentence, field=field)
    return Response(body, status_code=status, media_type=JSON, headers=headers)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    if isinstance(error, RunFailed):
        _log.error("request failed", path=request.scope["path"], error=str(error), exc_info=error)
    headers = {}
    if isinstance(error, BodyTooLarge | RequestTimeout):
        # What is left of the body is not read, so the connection cannot carry another request.
        headers["connection"] = "close"
    if isinstance(error, UnsupportedMedia) and error.field == "content-encoding":
        headers["accept-encoding"] = "gzip, deflate"
    if isinstance(error, QueueFull):
        headers["retry-after"] = str(error.retry_after_s)
    return _error(request, error.status, str(error), field=error.field, headers=headers)


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, headers = request.scope["path"], dict(error.headers or {})
    if len(path) > SHOWN_CHARACTERS:
        path = f"{path[:SHOWN_CHARACTERS]}..."
    sentence = str(error.detail)
    if error.status_code == 404:
        sentence = f"there is nothing at {path}"
    elif error.status_code == 405:
        methods = {method.strip() for method in headers.get("Allow", "").split(",")} - {""}
        if "GET" in methods:  # `AnswerHead` answers it there
            methods.add("HEAD")
        headers["Allow"] = ", ".join(sorted(methods))
        sentence = f"{path} does not answer {request.method[:SHOWN_CHARACTERS]}: it answers"
        sentence += f" {' and '.join(sorted(methods))}"
    return _error(request, error.status_code, sentence, headers=headers)


async def _hung_up(request: Request, error: Exception) -> Response:
    return _error(request, CLIENT_CLOSED_REQUEST, "the client hung up")


async def _fail(request: Request, error: Exception) -> Response:
    # Starlette raises it again after this answer, and the server's log shows it; the caller must
    # not see its inside.
    return _error(request, 500, "the server failed on this request; its log says why")


_HANDLERS = {
    RequestError: _refuse,
    HTTPException: _refuse_route,
    ClientDisconnect: _hung_up,
    Exception: _fail,
}
