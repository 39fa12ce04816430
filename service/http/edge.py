"""What stands around every request: its id, its log line, its figures, its headers. Knows no route
and reads no body.

From outside in: traces, `Edge`, CORS, API keys, HEAD, the application.
"""

from __future__ import annotations

import math
import random
import re
import time
import uuid
from collections.abc import Callable
from typing import Protocol
from urllib.parse import quote

import structlog
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.typing import FilteringBoundLogger

from evalmode.service.errors import error_body
from evalmode.service.http.head import AnswerHead
from evalmode.service.http.security import ApiKeys, RequireKey, header
from evalmode.service.settings import Settings, setting_named
from evalmode.service.strict_json import shown
from evalmode.service.telemetry.timings import fields_of, is_streamed
from evalmode.service.telemetry.tracing import Tracing

QUIET_PATHS = frozenset({"/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/metrics"})
HUNG_UP = 499  # nginx's number for it: only the log and the metrics ever see it

_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LOGGED_PATH_CHARACTERS = 256
_REASONS = {
    400: "invalid",
    401: "unauthorized",
    403: "forbidden",
    408: "request_timeout",
    409: "conflict",
    413: "too_large",
    415: "invalid",
    422: "invalid",
    HUNG_UP: "cancelled",
    500: "failed",
    503: "not_ready",
    504: "deadline",
}
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_CROSS_ORIGIN_METHODS = ("GET", "HEAD", "POST")
_CROSS_ORIGIN_HEADERS = (
    "Authorization",
    "Content-Encoding",
    "Content-Type",
    "Inference-Header-Content-Length",
    "X-API-Key",
    "X-Request-ID",
    "X-Request-Timeout-Ms",
)
_TLS_HEADERS = ((b"strict-transport-security", b"max-age=31536000"),)


class RequestFigures(Protocol):
    """Who counts requests: `Metrics`, or a test's."""

    def request_began(self) -> None:
        """A request's headers are there."""

    def request_ended(
        self, *, route: str, method: str, status: int, duration_s: float, reason: str | None
    ) -> None:
        """It was answered."""


class Parts(Protocol):
    """What of a server's state its edge needs."""

    @property
    def settings(self) -> Settings:
        """How the server is set up."""

    @property
    def metrics(self) -> RequestFigures:
        """Who counts."""


def surround(app: FastAPI, parts: Parts, *, tracing: Tracing | None = None) -> None:
    """Put the edge around all that `app` answers, its error pages too. Call it last: it freezes
    handlers.

    Raises StartFailed where API keys are wanted and cannot be had.
    """
    settings = parts.settings
    inner: ASGIApp = AnswerHead(app.build_middleware_stack())
    if keys := ApiKeys.of(settings):
        inner = RequireKey(inner, keys)
    if settings.cors_origins:
        inner = _CrossOrigin(
            inner,
            allow_origins=settings.cors_origins,
            allow_methods=_CROSS_ORIGIN_METHODS,
            allow_headers=_CROSS_ORIGIN_HEADERS,
            expose_headers=(
                "Inference-Header-Content-Length",
                "Retry-After",
                "X-Evalmode-Digest",
                "X-Request-ID",
            ),
        )
    edge: ASGIApp = Edge(
        inner,
        figures=parts.metrics,
        log_share=settings.access_log,
        slow_s=settings.slow_request_s,
        tls=settings.ssl_certfile is not None,
    )
    # `app.add_middleware` would stand inside of what answers 500, and its answers would have
    # neither id nor headers.
    app.middleware_stack = tracing.around(edge, quiet=QUIET_PATHS) if tracing else edge


class _CrossOrigin(CORSMiddleware):
    """CORS whose refusals have the form of all errors."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what a browser asks before it asks, or let the request through."""
        headers = (
            Headers(scope=scope) if scope["type"] == "http" and scope["method"] == "OPTIONS" else {}
        )
        if "origin" in headers and "access-control-request-method" in headers:
            response = self.preflight_response(request_headers=Headers(scope=scope))
            if response.status_code != 200:
                sentence = (
                    f"a page of {shown(headers['origin'])} may not send this request: add its"
                    f" origin to {setting_named('cors_origins')}, and use the methods and headers"
                    " that this answer allows"
                )
                response.body = error_body(scope["path"], sentence)
                response.headers["content-type"] = "application/json"
                response.headers["content-length"] = str(len(response.body))
            await response(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class Edge:
    """Gives a request its id, and when it is answered counts it, logs it, and stands behind what
    failed in it.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        figures: RequestFigures,
        log_share: float = 1.0,
        slow_s: float = math.inf,
        tls: bool = False,
        log: FilteringBoundLogger | None = None,
        chance: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._app = app
        self._figures = figures
        self._log_share = log_share
        self._slow_s = slow_s
        self._headers = _HEADERS + (_TLS_HEADERS if tls else ())
        self._log = log or structlog.get_logger("evalmode.access")
        self._chance = chance
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; all else goes through untouched."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        request_id = _request_id(scope)
        state["request_id"] = request_id
        traced = {"trace_id": state["trace_id"]} if "trace_id" in state else {}
        bound = structlog.contextvars.bind_contextvars(request_id=request_id, **traced)
        exchange = _Exchange(
            receive, send, (*self._headers, (b"x-request-id", request_id.encode()))
        )
        self._figures.request_began()
        began = self._clock()
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            await self._stand_behind(scope, exchange, error)
        finally:
            self._end(scope, exchange, self._clock() - began)
            # else the server has something to say of this request, and says it with its id
            if exchange.finished:
                structlog.contextvars.reset_contextvars(**bound)

    async def _stand_behind(self, scope: Scope, exchange: _Exchange, error: Exception) -> None:
        # Logged here and not raised further: the server would log it again, out of the request and
        # without its id.
        self._log.error("request crashed", path=_path(scope), exc_info=error)
        if exchange.status is None:
            sentence = "the server failed on this request; its log says why; request "
            body = error_body(scope["path"], sentence + scope["state"]["request_id"])
            await exchange.answer(500, body)
        elif not exchange.finished:
            # the client was told otherwise, and that the connection breaks is how it will know
            exchange.status = 500

    def _end(self, scope: Scope, exchange: _Exchange, duration_s: float) -> None:
        status = exchange.status or HUNG_UP
        if not exchange.finished and status < 500:
            status = HUNG_UP
        route, method = _route(scope), scope["method"]
        quiet = scope["path"] in QUIET_PATHS
        self._figures.request_ended(
            route=route,
            method=method if method in _METHODS else "other",
            status=status,
            duration_s=duration_s,
            reason=None if quiet else _reason(status, exchange),
        )
        slow = duration_s >= self._slow_s and not is_streamed(scope)
        if status < 500 and not slow and (quiet or self._chance() >= self._log_share):
            return
        client = scope.get("client")
        (self._log.info if status < 500 else self._log.warning)(
            "request",
            method=method,
            path=_path(scope),
            route=route,
            status=status,
            duration_ms=round(duration_s * 1000, 3),
            received_bytes=exchange.received_bytes,
            sent_bytes=exchange.sent_bytes,
            client=client[0] if client else None,
            **fields_of(scope),
        )


class _Exchange:
    """The messages of one request: counts their bytes, and adds headers to the answer where it has
    none of its own.
    """

    __slots__ = (
        "_added",
        "_receive",
        "_send",
        "finished",
        "queue_full",
        "received_bytes",
        "sent_bytes",
        "status",
    )

    def __init__(
        self, receive: Receive, send: Send, added: tuple[tuple[bytes, bytes], ...]
    ) -> None:
        self._receive = receive
        self._send = send
        self._added = added
        self.status: int | None = None
        self.queue_full = False
        self.finished = False
        self.received_bytes = 0
        self.sent_bytes = 0

    async def receive(self) -> Message:
        """The next message of the client."""
        message = await self._receive()
        if body := message.get("body"):
            self.received_bytes += len(body)
        return message

    async def send(self, message: Message) -> None:
        """The next message to the client."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            given = {name.lower() for name, _ in headers}
            self.queue_full = b"retry-after" in given
            headers += [added for added in self._added if added[0] not in given]
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body":
            self.sent_bytes += len(message.get("body", b""))
            self.finished = not message.get("more_body", False)
        await self._send(message)

    async def answer(self, status: int, body: bytes) -> None:
        """A whole answer of our own."""
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _request_id(scope: Scope) -> str:
    shown = header(scope, b"x-request-id")
    return shown.decode() if shown is not None and _ID.fullmatch(shown) else uuid.uuid4().hex


def _route(scope: Scope) -> str:
    """The template of the request's path: there are few, while paths are as many as clients
    like.
    """
    if (path := getattr(scope.get("route"), "path", None)) is not None:
        return str(path)
    if "endpoint" in scope and not scope.get("path_params") and not scope.get("root_path"):
        # a route of Starlette's own, and without parameters the path is its template
        return str(scope["path"])
    return "unmatched"


def _path(scope: Scope) -> str:
    raw = scope.get("raw_path", b"").partition(b"?")[0]
    # Still percent-encoded, so that nobody writes lines or colours into a log.
    path = quote(raw or scope["path"].encode("utf-8", "surrogatepass"), safe="/%:@!$&'()*+,;=~")
    return path[:_LOGGED_PATH_CHARACTERS]


def _reason(status: int, exchange: _Exchange) -> str | None:
    return "queue_full" if status == 503 and exchange.queue_full else _REASONS.get(status)
