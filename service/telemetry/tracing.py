"""OpenTelemetry traces: a span for each request, and in it one for its wait and one for its run.

OpenTelemetry is imported only if an endpoint is set. It must be installed only then.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import evalmode
from evalmode.service.batching.observer import Observer, RanBatch
from evalmode.service.errors import StartFailed
from evalmode.service.settings import Settings
from evalmode.service.telemetry.timings import fields_of

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

# OpenTelemetry's own variables: those that name an endpoint, and those that name the service.
_ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_SERVICE_NAME_VARIABLES = ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES")
# What the protocol (OTLP over HTTP) appends to the base URL of a collector.
_TRACES_PATH = "/v1/traces"

_log = structlog.get_logger("evalmode.service")


def open_tracing(settings: Settings) -> Tracing | None:
    """Tracing to the endpoint in the settings or in OpenTelemetry's variables; None without one.

    Raises StartFailed if the packages for it are not installed.
    """
    endpoint = settings.otlp_endpoint
    if endpoint is None and not any(map(os.environ.get, _ENDPOINT_VARIABLES)):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        # `wrap` imports it again. Here a missing package is reported at the start.
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware  # noqa: F401
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise StartFailed(
            f"setting otlp_endpoint asks for traces, and {error.name} is not installed: pip install"
            " 'evalmode[tracing]'"
        ) from error
    attributes = {"service.version": evalmode.__version__}
    if not any(map(os.environ.get, _SERVICE_NAME_VARIABLES)):
        attributes["service.name"] = "evalmode"
    # As with OpenTelemetry's variable, the endpoint is a base URL. The exporter's argument is not.
    if endpoint is not None and not endpoint.rstrip("/").endswith(_TRACES_PATH):
        endpoint = endpoint.rstrip("/") + _TRACES_PATH
    provider = TracerProvider(resource=Resource.create(attributes))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracing(provider)


class Tracing(Observer):
    """Makes spans and sends them to the collector.

    As an observer of the engine it makes spans for the rows registered with `following`.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace

        self._trace = trace
        self._provider = provider
        self._tracer = provider.get_tracer("evalmode", evalmode.__version__)
        # The trace context of each row in `following`, by the row's id.
        self._parents: dict[int, Context] = {}

    def wrap(self, app: ASGIApp, *, quiet: Collection[str] = ()) -> ASGIApp:
        """`app` with a server span around each request, except for the paths in `quiet`."""
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
        from opentelemetry.metrics import NoOpMeterProvider

        async def app_in_span(scope: Scope, receive: Receive, send: Send) -> None:
            span = self._trace.get_current_span()
            original: Scope = scope["evalmode.scope"]

            async def send_and_describe(message: Message) -> None:
                if message["type"] == "http.response.start":
                    # The router has set the route, if there is one for the path.
                    route = getattr(original.get("route"), "path", None)
                    if route is not None and span.is_recording():
                        span.update_name(f"{original['method']} {route}")
                        span.set_attribute("http.route", route)
                elif not message.get("more_body"):
                    # Before the last message, with which OpenTelemetry ends the span.
                    _add_timings(span, original)
                await send(message)

            original["state"]["trace_id"] = format(span.get_span_context().trace_id, "032x")
            try:
                await app(original, receive, send_and_describe)
            finally:
                # Again, for a request that did not get its whole answer.
                _add_timings(span, original)

        middleware = OpenTelemetryMiddleware(
            app_in_span,
            default_span_details=lambda scope: (scope["method"], {}),
            tracer_provider=self._provider,
            meter_provider=NoOpMeterProvider(),
            exclude_spans=["receive", "send"],
        )

        async def traced_app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["path"] in quiet:
                await app(scope, receive, send)
                return
            scope.setdefault("state", {})
            # Without the query: it may hold private data, which must not leave this machine.
            public_scope: MutableMapping[str, Any] = {
                **scope,
                "query_string": b"",
                "evalmode.scope": scope,
            }
            await middleware(public_scope, receive, send)

        return traced_app

    @contextmanager
    def following(self, rows: Iterable[object]) -> Iterator[None]:
        """Add spans to the current request for each batch with some of these rows.

        Rows are compared by identity, so they must stay alive meanwhile.
        """
        from opentelemetry.context import get_current

        if not self._trace.get_current_span().is_recording():
            yield
            return
        parent = get_current()
        ids = [id(row) for row in rows]
        self._parents.update(dict.fromkeys(ids, parent))
        try:
            yield
        finally:
            for row_id in ids:
                self._parents.pop(row_id, None)

    def batch_ran(self, batch: RanBatch) -> None:
        """A batch has just ended. Each request that follows some of its rows gets a span for its
        longest wait and one for the run.
        """
        # By the id of the context, because contexts are not hashable.
        parents: dict[int, Context] = {}
        waits_s: dict[int, list[float]] = {}
        for row, wait_s in zip(batch.rows, batch.waited_s, strict=True):
            if (parent := self._parents.get(id(row))) is not None:
                parents[id(parent)] = parent
                waits_s.setdefault(id(parent), []).append(wait_s)
        ended_ns = time.time_ns()
        began_ns = ended_ns - round(batch.run_s * 1e9)
        for key, parent in parents.items():
            attributes: dict[str, str | int] = {
                "evalmode.model": batch.bucket.model,
                "evalmode.version": batch.bucket.version,
                "evalmode.bucket": batch.bucket.label,
                "evalmode.rows": len(waits_s[key]),
                "evalmode.batch.rows": len(batch.rows),
                "evalmode.batch.places": batch.size,
            }
            arrived_ns = began_ns - round(max(waits_s[key]) * 1e9)
            for name, start_ns, end_ns in (
                ("queue wait", arrived_ns, began_ns),
                ("model run", began_ns, ended_ns),
            ):
                span = self._tracer.start_span(
                    name, parent, attributes=attributes, start_time=start_ns
                )
                span.end(end_ns)

    def close(self, *, timeout_s: float = 5.0) -> bool:
        """Send the remaining spans. False if they were not sent in time, for example because the
        collector is down.
        """
        # The exporter has no time limit that could be set, and the end of a server needs one.
        closing = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        closing.start()
        closing.join(timeout_s)
        if closing.is_alive():
            _log.warning("traces were not sent in time and are lost", timeout_s=timeout_s)
        return not closing.is_alive()


def _add_timings(span: Span, scope: Scope) -> None:
    if span.is_recording():
        for name, value in fields_of(scope).items():
            span.set_attribute(f"evalmode.{name}", value)
