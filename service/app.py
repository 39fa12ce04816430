"""The HTTP application: its routes, its middleware, and one form for every error.

`create_app(components)` builds it. Importing this module has no effect.
"""

from __future__ import annotations

# Before FastAPI: this package imports it in a cheaper way.
import evalmode.service.http  # isort: skip

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

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
from evalmode.service.lean_imports import left_out
from evalmode.service.protocol.metadata import ServerState
from evalmode.service.strict_json import SHOWN_CHARACTERS
from evalmode.service.telemetry.metrics import render

_log = structlog.get_logger("evalmode.service")


class _Application(FastAPI):
    """FastAPI whose OpenAPI schema mentions API keys if the settings have any."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. FastAPI would first look for telemetry, and we have our own."""
        if scope["type"] == "http" and self.middleware_stack is not None:
            scope["app"] = self
            await self.middleware_stack(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """The schema of all routes."""
        schema = super().openapi()
        if requires_key(self.state.components.settings):
            docs.describe_keys(schema)
        return schema


# FastAPI asks of each route whether its models are those of pydantic's first version. Their import
# would take a quarter of the time of this function.
@left_out("pydantic.v1")
def create_app(components: Components) -> FastAPI:
    """The application of these components.

    When it stops, it answers what was accepted and closes the components.
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
        # FastAPI's pages load their scripts from a CDN, which a server may be unable to reach.
        docs_url=None,
        redoc_url=None,
        # Clients do not repeat a POST after a redirect, and a redirect is no error in our form.
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.components = components
    app.state.streams = Streams(
        components.engine,
        parallel=components.engine.load.parallel,
        max_line_bytes=components.settings.max_body_bytes,
        silence_s=components.settings.body_timeout_s,
        queue_rows=components.settings.queue_rows,
        draining=lambda: components.health.stage is Stage.DRAINING,
        drain_s=components.settings.drain_s,
    )
    direct_routes: list[APIRoute] = []
    for router in (v1.routes(components.settings), v2.routes(components.settings)):
        _include(app, router)
        direct_routes += [
            route
            for route in router.routes
            if isinstance(route, APIRoute) and route.endpoint in (v1.predict, v2.infer)
        ]

    # The routes about the server process: its health and its metrics.
    process_routes = APIRouter(generate_unique_id_function=lambda route: route.name)
    for name, endpoint in (("livez", health.live), ("readyz", health.ready)):
        process_routes.add_api_route(
            f"/{name}",
            endpoint,
            name=name,
            response_model=ServerState,
            responses={503: {"model": ErrorResponse}},
        )
    if components.settings.metrics:
        process_routes.add_api_route("/metrics", metrics, name="metrics", response_class=Response)
    _include(app, process_routes)
    if components.settings.docs:
        docs.mount(app)

    app.add_exception_handler(RequestError, _answer_request_error)
    app.add_exception_handler(HTTPException, _answer_routing_error)
    app.add_exception_handler(ClientDisconnect, _answer_disconnect)
    app.add_exception_handler(Exception, _answer_failure)
    add_middleware(
        app,
        components.settings,
        components.metrics,
        tracing=components.tracing,
        direct_routes=direct_routes,
    )
    return app


def _include(app: FastAPI, router: APIRouter) -> None:
    """Add the routes of a router as they are.

    `include_router` would build all of them again, at the first request (FastAPI 0.165): 60 ms in
    which no other request is answered.
    """
    app.router.routes.extend(router.routes)


async def metrics(request: Request) -> Response:
    """The server's figures, for Prometheus."""
    components = components_of(request)
    families = await components.processes.figures("metrics")
    # In a thread, because a thousand series take milliseconds.
    body, content_type = await asyncio.to_thread(
        render, families, request.headers.get("accept", "")
    )
    return Response(body, headers={"content-type": content_type})


# Handlers of exceptions. Starlette declares them for any exception, so each asserts its own.


async def _answer_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    path = request.scope["path"]
    if isinstance(error, RunFailed):
        _log.error("request failed", path=path, error=str(error), exc_info=error)

    headers = {}
    if isinstance(error, BodyTooLarge | RequestTimeout):
        # The rest of the body is not read, so the connection cannot carry another request.
        headers["connection"] = "close"
    if isinstance(error, UnsupportedMedia) and error.field == "content-encoding":
        headers["accept-encoding"] = "gzip, deflate"
    if isinstance(error, QueueFull):
        headers["retry-after"] = str(error.retry_after_s)

    status = error.status
    if status == 422 and is_v2(path):
        # The Open Inference Protocol has 400 for everything that is wrong with a request.
        status = 400
    sentence = str(error)
    if status == 500:
        sentence = _with_request_id(sentence, request)
    body = error_body(path, sentence, field=error.field)
    return Response(body, status_code=status, media_type=JSON, headers=headers)


async def _answer_routing_error(request: Request, error: Exception) -> Response:
    """Answer Starlette's own errors: an unknown path, or a method that a path does not answer."""
    assert isinstance(error, HTTPException)
    path, headers = request.scope["path"], dict(error.headers or {})
    excerpt = path
    if len(path) > SHOWN_CHARACTERS:
        excerpt = f"{path[:SHOWN_CHARACTERS]}..."

    sentence = str(error.detail)
    if error.status_code == 404:
        sentence = f"there is nothing at {excerpt}"
    elif error.status_code == 405:
        methods = {method.strip() for method in headers.get("Allow", "").split(",")} - {""}
        # The middleware `AnswerHead` answers HEAD on every route for GET.
        if "GET" in methods:
            methods.add("HEAD")
        headers["Allow"] = ", ".join(sorted(methods))
        sentence = f"{excerpt} does not answer {request.method[:SHOWN_CHARACTERS]}: it answers"
        sentence += f" {' and '.join(sorted(methods))}"
    body = error_body(path, sentence)
    return Response(body, status_code=error.status_code, media_type=JSON, headers=headers)


async def _answer_disconnect(request: Request, error: Exception) -> Response:
    # The client never sees this answer. The log and the metrics do.
    body = error_body(request.scope["path"], "the client hung up")
    return Response(body, status_code=CLIENT_CLOSED_REQUEST, media_type=JSON)


async def _answer_failure(request: Request, error: Exception) -> Response:
    # Starlette raises the exception again after this answer, so the log gets its traceback. The
    # client must not see internals.
    sentence = "the server failed on this request; its log says why"
    body = error_body(request.scope["path"], _with_request_id(sentence, request))
    return Response(body, status_code=500, media_type=JSON)


def _with_request_id(sentence: str, request: Request) -> str:
    """The sentence with the id by which the log names the request."""
    request_id = request.scope.get("state", {}).get("request_id", "unknown")
    return f"{sentence}; request {request_id}"
