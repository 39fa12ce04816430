"""The middleware around all routes: the id of a request, its log line, its metrics, its headers.

From outside in, a request passes traces, `RequestMiddleware`, CORS, API keys, the short way to the
routes of inference, HEAD, and then the application with its error pages.
"""

from __future__ import annotations

import math
import random
import re
import secrets
import time
from collections.abc import Callable, Collection
from itertools import count
from urllib.parse import quote

import structlog
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.typing import FilteringBoundLogger

from evalmode.service.errors import error_body
from evalmode.service.health import PROBE_PATHS
from evalmode.service.http.api_keys import ApiKeys, RequireKey, header_value
from evalmode.service.http.direct import DirectRoutes
from evalmode.service.http.head import AnswerHead
from evalmode.service.settings import Settings, setting_named
from evalmode.service.strict_json import shown
from evalmode.service.telemetry.logs import request_fields
from evalmode.service.telemetry.metrics import Metrics
from evalmode.service.telemetry.timings import fields_of, is_streamed
from evalmode.service.telemetry.tracing import Tracing

# Probes call these every few seconds: they are neither traced nor, if they succeed, logged.
QUIET_PATHS = PROBE_PATHS | {"/metrics"}

# The status, in the log and in metrics, of a request whose client disconnected: nginx's number.
CLIENT_CLOSED_REQUEST = 499

# What a client may choose as the id of a request, which is then in logs and traces.
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")

# The ids of all other requests: a prefix that is random for each process, and a number. A random id
# for each request would cost a system call.
_ID_PREFIX = secrets.token_hex(8)
_id_numbers = count(1)

# A client may send any word as the method, and each one would be a series of the metrics.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_LOGGED_PATH_CHARACTERS = 256

# Why a request was rejected, in the metrics, by its status.
_REASONS = {
    400: "invalid",
    401: "unauthorized",
    403: "forbidden",
    408: "request_timeout",
    413: "too_large",
    415: "invalid",
    422: "invalid",
    CLIENT_CLOSED_REQUEST: "cancelled",
    500: "failed",
    503: "not_ready",
    504: "deadline",
}

# The headers that each response gets unless its handler has set them.
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_TLS_HEADERS = ((b"strict-transport-security", b"max-age=31536000"),)

# What pages of the allowed origins may send and read.
_CORS_METHODS = ("GET", "HEAD", "POST")
_CORS_REQUEST_HEADERS = (
    "Authorization",
    "Content-Encoding",
    "Content-Type",
    "Inference-Header-Content-Length",
    "X-API-Key",
    "X-Request-ID",
    "X-Request-Timeout-Ms",
)
_CORS_RESPONSE_HEADERS = (
    "Inference-Header-Content-Length",
    "Retry-After",
    "X-Evalmode-Digest",
    "X-Request-ID",
)


def add_middleware(
    app: FastAPI,
    settings: Settings,
    metrics: Metrics,
    *,
    tracing: Tracing | None = None,
    direct_routes: Collection[APIRoute] = (),
) -> None:
    """Put all middleware around `app` and its error pages.

    Call it last: a handler that is added later is ignored. The short way leads to `direct_routes`.
    Raises StartFailed for API keys that cannot be used.
    """
    asgi_app: ASGIApp = AnswerHead(app.build_middleware_stack())
    if direct_routes:
        asgi_app = DirectRoutes(asgi_app, app, direct_routes)
    keys = ApiKeys.of(settings)
    if keys is not None:
        asgi_app = RequireKey(asgi_app, keys)
    if settings.cors_origins:
        # Outside of the keys, because a browser sends the preflight of a request without its key.
        asgi_app = _CrossOrigin(
            asgi_app,
            allow_origins=settings.cors_origins,
            allow_methods=_CORS_METHODS,
            allow_headers=_CORS_REQUEST_HEADERS,
            expose_headers=_CORS_RESPONSE_HEADERS,
        )
    asgi_app = RequestMiddleware(
        asgi_app,
        metrics=metrics,
        log_share=settings.access_log,
        slow_s=settings.slow_request_s,
        tls=settings.ssl_certfile is not None,
    )
    if tracing is not None:
        asgi_app = tracing.wrap(asgi_app, quiet=QUIET_PATHS)
    # `app.add_middleware` would put it inside of Starlette's ServerErrorMiddleware, whose
    # responses with 500 would then have neither an id nor headers.
    app.middleware_stack = asgi_app


class _CrossOrigin(CORSMiddleware):
    """CORS whose refusals have the same form as all other errors."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a preflight, or pass the request on."""
        headers = Headers()
        if scope["type"] == "http" and scope["method"] == "OPTIONS":
            headers = Headers(scope=scope)
        if "origin" not in headers or "access-control-request-method" not in headers:
            await super().__call__(scope, receive, send)
            return
        response = self.preflight_response(request_headers=headers)
        if response.status_code != 200:
            response.body = error_body(
                scope["path"],
                f"a page of {shown(headers['origin'])} may not send this request: add its origin"
                f" to {setting_named('cors_origins')}, and use the methods and headers that this"
                " answer allows",
            )
            response.headers["content-type"] = "application/json"
            response.headers["content-length"] = str(len(response.body))
        await response(scope, receive, send)


class RequestMiddleware:
    """Gives each request an id, counts and logs it, and answers it with 500 if the app crashes."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        log_share: float = 1.0,
        slow_s: float = math.inf,
        tls: bool = False,
        log: FilteringBoundLogger | None = None,
        chance: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Wrap `app`.

        Successful requests are logged with the probability `log_share`. Those of at least `slow_s`
        seconds and those with a status of 500 or more are always logged.
        """
        self._app = app
        self._metrics = metrics
        self._log_share = log_share
        self._slow_s = slow_s
        self._headers = _HEADERS + _TLS_HEADERS if tls else _HEADERS
        self._log = log or structlog.get_logger("evalmode.access").bind()
        self._chance = chance
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; anything but HTTP is passed on unchanged."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        # The client may choose the id, to find its request in the log of this server.
        sent_id = header_value(scope, b"x-request-id")
        if sent_id is not None and _REQUEST_ID.fullmatch(sent_id):
            request_id = sent_id.decode()
        else:
            request_id = f"{_ID_PREFIX}{next(_id_numbers):016x}"
        state = scope.setdefault("state", {})
        state["request_id"] = request_id

        # All that is logged during the request has its id.
        fields = {"request_id": request_id}
        if "trace_id" in state:
            fields["trace_id"] = state["trace_id"]
        token = request_fields.set(fields)

        exchange = _Exchange(
            receive, send, (*self._headers, (b"x-request-id", request_id.encode()))
        )
        self._metrics.request_began()
        started = self._clock()
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            # Not raised again: the server would log it once more, without the id.
            self._log.error("request crashed", path=_logged_path(scope), exc_info=error)
            await self._answer_crash(scope, exchange, request_id)
        finally:
            self._end(scope, exchange, self._clock() - started)
            # If the response is unfinished, the server logs that, and should do so with the id.
            if exchange.is_finished:
                request_fields.reset(token)

    async def _answer_crash(self, scope: Scope, exchange: _Exchange, request_id: str) -> None:
        if exchange.status is None:
            body = error_body(
                scope["path"],
                f"the server failed on this request; its log says why; request {request_id}",
            )
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
            ]
            await exchange.send({"type": "http.response.start", "status": 500, "headers": headers})
            await exchange.send({"type": "http.response.body", "body": body})
        elif not exchange.is_finished:
            # Another status was sent already. The client notices the failure, because the server
            # closes the connection before the end of the response.
            exchange.status = 500

    def _end(self, scope: Scope, exchange: _Exchange, duration_s: float) -> None:
        """Count the request and log it."""
        status = exchange.status or CLIENT_CLOSED_REQUEST
        if not exchange.is_finished and status < 500:
            status = CLIENT_CLOSED_REQUEST
        # The template of the path, as `/v2/models/{model}`. There are few templates, and clients
        # may send any number of paths.
        route = "unmatched"
        template = getattr(scope.get("route"), "path", None)
        if template is not None:
            route = str(template)
        elif "endpoint" in scope and not scope.get("path_params") and not scope.get("root_path"):
            # Starlette's own routes, as /openapi.json, are not in the scope. Without parameters
            # their path is the template.
            route = str(scope["path"])
        method = scope["method"]
        is_quiet = scope["path"] in QUIET_PATHS

        reason: str | None = None
        # A probe that fails is not a rejected request.
        if not is_quiet:
            reason = _REASONS.get(status)
            if status == 503 and exchange.has_retry_after:
                reason = "queue_full"
        self._metrics.request_ended(
            route=route,
            method=method if method in _METHODS else "other",
            status=status,
            duration_s=duration_s,
            reason=reason,
        )

        # A stream takes as long as its client likes, so it is never slow.
        is_slow = duration_s >= self._slow_s and not is_streamed(scope)
        if status < 500 and not is_slow and (is_quiet or self._chance() >= self._log_share):
            return
        log = self._log.info if status < 500 else self._log.warning
        client = scope.get("client")
        log(
            "request",
            method=method,
            path=_logged_path(scope),
            route=route,
            status=status,
            duration_ms=round(duration_s * 1000, 3),
            received_bytes=exchange.received_bytes,
            sent_bytes=exchange.sent_bytes,
            client=client[0] if client else None,
            **fields_of(scope),
        )


class _Exchange:
    """The messages of one request and its response.

    It counts their bytes, and adds those `headers` to the response that it does not have.
    """

    # One is made for each request.
    __slots__ = (
        "_headers",
        "_receive",
        "_send",
        "has_retry_after",
        "is_finished",
        "received_bytes",
        "sent_bytes",
        "status",
    )

    def __init__(
        self, receive: Receive, send: Send, headers: tuple[tuple[bytes, bytes], ...]
    ) -> None:
        self._receive = receive
        self._send = send
        self._headers = headers
        self.status: int | None = None
        self.has_retry_after = False
        self.is_finished = False
        self.received_bytes = 0
        self.sent_bytes = 0

    async def receive(self) -> Message:
        """The next message from the client."""
        message = await self._receive()
        self.received_bytes += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        """Send the next message to the client."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            names = {name.lower() for name, _ in headers}
            # Only a full queue has it.
            self.has_retry_after = b"retry-after" in names
            for name, value in self._headers:
                if name not in names:
                    headers.append((name, value))
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body":
            self.sent_bytes += len(message.get("body", b""))
            self.is_finished = not message.get("more_body", False)
        await self._send(message)


def _logged_path(scope: Scope) -> str:
    """The path, percent-encoded and cut, so that no client can write lines or colours to a log."""
    raw = scope.get("raw_path", b"").partition(b"?")[0]
    if not raw:
        raw = scope["path"].encode("utf-8", "surrogatepass")
    return quote(raw, safe="/%:@!$&'()*+,;=~")[:_LOGGED_PATH_CHARACTERS]
