"""Traces, as a real collector gets them."""

from __future__ import annotations

import asyncio
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Response
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from evalmode.service.batching.bucket import Bucket
from evalmode.service.batching.observer import RanBatch
from evalmode.service.errors import StartFailed
from evalmode.service.http.middleware import QUIET_PATHS, RequestMiddleware, add_middleware
from evalmode.service.settings import Settings
from evalmode.service.telemetry.logs import request_fields
from evalmode.service.telemetry.metrics import Metrics
from evalmode.service.telemetry.tracing import Tracing, open_tracing
from tests.service.served import serving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TIMES = ("read", "encode", "queue", "run", "write")
BUCKET = Bucket(model="languages", version="1", label="32", positions=32, run=list, costs={1: 1.0})


def rows_of(count: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(tokens=1, nbytes=8) for _ in range(count)]


class Collector:
    """Receives spans as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self._requests: queue.Queue[tuple[str, bytes]] = queue.Queue()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector._requests.put((self.path, body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.resource: dict[str, str] = {}

    def spans(self) -> list[Span]:
        """The spans that have arrived since the last call."""
        spans: list[Span] = []
        while not self._requests.empty():
            path, body = self._requests.get()
            assert path == "/v1/traces"
            for part in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.resource = {
                    pair.key: pair.value.string_value for pair in part.resource.attributes
                }
                spans += [span for scope in part.scope_spans for span in scope.spans]
        return spans

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    opened = Collector()
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


def opened(url: str | None = None) -> Tracing:
    tracing = open_tracing(Settings(otlp_endpoint=url))
    assert tracing is not None
    return tracing


def attributes(span: Span) -> dict[str, Any]:
    return {
        pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes
    }


class Log:
    """A logger that does nothing."""

    def info(self, event: str, **values: Any) -> None:
        """A line."""


def traced_app(tracing: Tracing, handler: Any = None) -> FastAPI:
    app = FastAPI()
    routes = APIRouter()

    async def infer(name: str) -> Response:
        if handler is not None:
            await handler()
        return Response(status_code=503 if name == "failing" else 200)

    async def livez() -> str:
        return "ok"

    routes.add_api_route("/v2/models/{name}/infer", infer, methods=["POST"])
    routes.add_api_route("/livez", livez)
    app.include_router(routes)
    add_middleware(app, Settings(), Metrics(), tracing=tracing)
    return app


def ask(app: Any, path: str, *, method: str = "POST", times: int = 1, **headers: str) -> None:
    async def go() -> None:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test"
        ) as client:
            await asyncio.gather(
                *(client.request(method, path, headers=headers) for _ in range(times))
            )

    asyncio.run(go())


def test_without_an_endpoint_there_are_no_traces_and_no_tracing_package_is_imported():
    assert open_tracing(Settings()) is None
    program = (
        "import sys; from evalmode.service.settings import Settings; from evalmode.service.http"
        " import middleware; "
        "from evalmode.service.telemetry import tracing; "
        "assert tracing.open_tracing(Settings()) is None; "
        # FastAPI itself loads the bare API where that is installed.
        "print({name.split('.')[1] for name in sys.modules if name.startswith('opentelemetry.')})"
    )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("OTEL_")
    }
    process = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert not [
        package
        for package in ("sdk", "exporter", "instrumentation", "proto")
        if f"'{package}'" in process.stdout
    ]


def test_without_the_packages_the_server_does_not_start_and_the_error_says_how_to_install_them(
    monkeypatch,
):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(StartFailed, match=r"pip install 'evalmode\[tracing\]'"):
        open_tracing(Settings(otlp_endpoint="http://collector:4318"))


@pytest.mark.parametrize("suffix", ["", "/", "/v1/traces"])
def test_an_endpoint_is_a_base_url_and_may_include_the_path_of_traces(collector, suffix):
    tracing = opened(collector.url + suffix)
    ask(traced_app(tracing), "/v2/models/m/infer")
    assert tracing.close()
    assert len(collector.spans()) == 1


@pytest.mark.parametrize(
    ("variable", "path"),
    [("OTEL_EXPORTER_OTLP_ENDPOINT", ""), ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "/v1/traces")],
)
def test_opentelemetrys_own_variables_count(collector, monkeypatch, variable, path):
    monkeypatch.setenv(variable, collector.url + path)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "by-the-environment")
    tracing = opened()
    ask(traced_app(tracing), "/v2/models/m/infer")
    assert tracing.close()
    assert len(collector.spans()) == 1
    assert collector.resource["service.name"] == "by-the-environment"


def test_a_request_is_a_server_span_of_the_callers_trace_named_by_its_route_and_without_its_query(
    collector,
):
    tracing = opened(collector.url)
    ask(traced_app(tracing), "/v2/models/m/infer?secret=1", traceparent=f"00-{TRACE}-{PARENT}-01")
    assert tracing.close()
    (span,) = collector.spans()
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert (span.name, span.kind) == ("POST /v2/models/{name}/infer", Span.SPAN_KIND_SERVER)
    assert attributes(span)["http.route"] == "/v2/models/{name}/infer"
    assert attributes(span)["http.status_code"] == 200
    assert "secret" not in str(span)
    assert collector.resource["service.name"] == "evalmode"


def test_a_trace_that_its_caller_does_not_record_is_not_sent(collector):
    tracing = opened(collector.url)
    ask(traced_app(tracing), "/v2/models/m/infer", traceparent=f"00-{TRACE}-{PARENT}-00")
    assert tracing.close()
    assert collector.spans() == []


def test_a_failure_shows_in_the_span(collector):
    tracing = opened(collector.url)
    ask(traced_app(tracing), "/v2/models/failing/infer")
    assert tracing.close()
    (span,) = collector.spans()
    assert span.status.code == span.status.STATUS_CODE_ERROR


@pytest.mark.parametrize("path", sorted(QUIET_PATHS))
def test_probes_and_metrics_are_not_traced(collector, path):
    tracing = opened(collector.url)
    ask(traced_app(tracing), path, method="GET")
    assert tracing.close()
    assert collector.spans() == []


def test_a_model_with_the_name_of_a_probe_is_traced(collector):
    tracing = opened(collector.url)
    ask(traced_app(tracing), "/v2/models/metrics/infer")
    assert tracing.close()
    assert len(collector.spans()) == 1


def test_the_wait_and_the_run_are_spans_in_the_request_one_after_the_other(collector):
    tracing = opened(collector.url)

    async def ran() -> None:
        row, *others = rows_of(3)
        with tracing.following([row]):
            tracing.batch_ran(
                RanBatch(
                    bucket=BUCKET,
                    rows=[row, *others],
                    size=4,
                    waited_s=(0.25, 0.75, 0.0),
                    run_s=0.5,
                )
            )

    ask(traced_app(tracing, ran), "/v2/models/m/infer")
    assert tracing.close()
    spans = {span.name: span for span in collector.spans()}
    wait, run, server = (
        spans["queue wait"],
        spans["model run"],
        spans["POST /v2/models/{name}/infer"],
    )
    assert wait.parent_span_id == run.parent_span_id == server.span_id
    assert wait.trace_id == run.trace_id == server.trace_id
    assert wait.end_time_unix_nano - wait.start_time_unix_nano == 250_000_000
    assert run.end_time_unix_nano - run.start_time_unix_nano == 500_000_000
    assert wait.end_time_unix_nano == run.start_time_unix_nano
    assert attributes(run) == {
        "evalmode.model": "languages",
        "evalmode.version": "1",
        "evalmode.bucket": "32",
        "evalmode.rows": 1,
        "evalmode.batch.rows": 3,
        "evalmode.batch.places": 4,
    }


def test_two_requests_that_share_a_batch_have_their_own_spans(collector):
    tracing = opened(collector.url)
    gathered: list[Any] = []
    two_there = asyncio.Barrier(2)

    async def answered() -> None:
        rows = rows_of(2)
        with tracing.following(rows):
            gathered.extend(rows)
            if await two_there.wait() == 0:  # in another thread, as the engine does
                batch = RanBatch(
                    bucket=BUCKET,
                    rows=[gathered[0], gathered[2], gathered[1], gathered[3]],
                    size=4,
                    waited_s=(0.5, 0.1, 0.2, 0.25),
                    run_s=1.0,
                )
                run = threading.Thread(target=tracing.batch_ran, args=(batch,))
                run.start()
                run.join()
            await two_there.wait()

    ask(traced_app(tracing, answered), "/v2/models/m/infer", times=2)
    # A batch whose requests are done already, for example at their deadline.
    tracing.batch_ran(
        RanBatch(bucket=BUCKET, rows=gathered, size=4, waited_s=(0.0,) * 4, run_s=1.0)
    )
    assert tracing.close()
    spans = collector.spans()
    servers = {span.span_id: span.trace_id for span in spans if span.kind == Span.SPAN_KIND_SERVER}
    waits = [span for span in spans if span.name == "queue wait"]
    assert len(servers) == len(waits) == 2
    assert len(spans) == 6
    assert {wait.parent_span_id: wait.trace_id for wait in waits} == servers
    longest = sorted(wait.end_time_unix_nano - wait.start_time_unix_nano for wait in waits)
    assert longest == [250_000_000, 500_000_000]
    assert {attributes(wait)["evalmode.rows"] for wait in waits} == {2}


def test_log_lines_of_a_request_have_its_trace_id(collector):
    tracing = opened(collector.url)
    bound: list[dict[str, Any]] = []

    async def looks(scope, receive, send):
        bound.append(request_fields.get())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    middleware = RequestMiddleware(looks, metrics=Metrics(), log=Log())  # type: ignore[arg-type]
    ask(tracing.wrap(middleware), "/x", traceparent=f"00-{TRACE}-{PARENT}-01")
    tracing.close()
    assert bound[0]["trace_id"] == TRACE


def test_a_missing_collector_delays_neither_a_request_nor_the_end():
    threads = set(threading.enumerate())
    tracing = opened("http://127.0.0.1:9")
    began = time.monotonic()
    ask(traced_app(tracing), "/v2/models/m/infer")
    tracing.close(timeout_s=2.0)
    assert time.monotonic() - began < 10
    # The exporter still tries again, after random times. A later test in this process may export a
    # module, and the export would notice the draws from Python's generator.
    for thread in set(threading.enumerate()) - threads:
        thread.join(60)


def test_the_span_of_a_prediction_has_the_fields_of_its_log_line(collector, bundle):
    with serving(bundle, otlp_endpoint=collector.url) as served:
        content = b'{"inputs": ["a", "Dit is een zin van een paar woorden."]}'
        headers = {"content-type": "application/json"}
        answer = served.ask("POST", "/v1/predict", content=content, headers=headers)
        assert answer.status_code == 200
    spans = collector.spans()
    (server,) = (span for span in spans if span.kind == Span.SPAN_KIND_SERVER)
    fields = {name: value for name, value in attributes(server).items() if "evalmode." in name}
    times = {name: fields.pop(f"evalmode.{name}_ms") for name in TIMES}
    assert fields == {
        "evalmode.model": "tiny",
        "evalmode.version": "1",
        "evalmode.rows": 2,
        "evalmode.bucket": "16",
    }
    assert times["run"] > 0
    assert sum(times.values()) * 1e6 <= server.end_time_unix_nano - server.start_time_unix_nano
    assert {span.name for span in spans} >= {"queue wait", "model run"}
