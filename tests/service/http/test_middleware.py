"""The middleware wrapped a request: its id, its metrics, its log line, its headers, its crash."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request, Response
from starlette.responses import StreamingResponse

from evalmode.service.http.middleware import RequestMiddleware


class Log:
    """Records what is logged."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def __getattr__(self, level: str):
        return lambda event, **values: self.lines.append({"level": level, "event": event, **values})


@dataclass
class FakeMetrics:
    """Records what is counted."""

    in_flight: int = 0
    ended: list[dict[str, Any]] = field(default_factory=list)

    def request_began(self) -> None:
        self.in_flight += 1

    def request_ended(self, **values: Any) -> None:
        self.in_flight -= 1
        self.ended.append(values)


def router() -> APIRouter:
    routes = APIRouter(prefix="/v2")

    @routes.get("/models/{name}/infer")
    async def infer(name: str, request: Request) -> dict[str, str]:
        return {"name": name, "id": request.state.request_id}

    @routes.get("/models/{name}/crash")
    async def crash(name: str) -> None:
        raise ZeroDivisionError("a crash of the tests")

    @routes.get("/models/{name}/status/{status}")
    async def status(name: str, status: int) -> Response:
        return Response(status_code=status, headers={"retry-after": "3"} if name == "full" else {})

    return routes


def make_app() -> FastAPI:
    app = FastAPI(redirect_slashes=False)
    app.include_router(router())

    @app.post("/echo")
    async def echo(request: Request) -> Response:
        return Response(
            await request.body(), headers={"content-security-policy": "default-src 'self'"}
        )

    @app.get("/livez")
    async def livez() -> str:
        return "ok"

    @app.get("/readyz")
    async def readyz() -> Response:
        return Response(status_code=503)

    @app.get("/breaks-off")
    async def breaks_off() -> StreamingResponse:
        async def lines():
            yield b"one\n"
            raise ZeroDivisionError

        return StreamingResponse(lines())

    return app


@dataclass
class WrappedApp:
    """An application in its middleware, with what that counts and logs."""

    app: Any
    metrics: FakeMetrics
    log: Log

    def ask(
        self, path: str, *, method: str = "GET", content: bytes | None = None, **headers: str
    ) -> httpx.Response:
        async def send() -> httpx.Response:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(self.app), base_url="http://test"
            ) as client:
                sent_headers = {name.replace("_", "-"): value for name, value in headers.items()}
                return await client.request(method, path, headers=sent_headers, content=content)

        return asyncio.run(send())

    @property
    def line(self) -> dict[str, Any]:
        return [line for line in self.log.lines if line["event"] == "request"][-1]

    @property
    def counted(self) -> dict[str, Any]:
        return self.metrics.ended[-1]


def wrap(app: Any = None, **options: Any) -> WrappedApp:
    metrics, log = FakeMetrics(), Log()
    return WrappedApp(
        RequestMiddleware(app or make_app(), metrics=metrics, log=log, **options), metrics, log
    )


def test_an_id_in_the_request_is_used_by_the_application_and_returned():
    answer = wrap().ask("/v2/models/m/infer", x_request_id="Trace-1.2:3_4")
    assert answer.headers["x-request-id"] == answer.json()["id"] == "Trace-1.2:3_4"


@pytest.mark.parametrize("sent_id", [None, "", " ", "a b", "a" * 129, "{}", 'a"b', "a\tb", "ü"])
def test_a_missing_or_harmful_id_is_replaced_by_a_random_one(sent_id):
    headers = {} if sent_id is None else {"x_request_id": sent_id.encode()}
    ids = [wrap().ask("/v2/models/m/infer", **headers).headers["x-request-id"] for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in ids)
    assert ids[0] != ids[1]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/m/infer", 200),
        ("GET", "/nothing", 404),
        ("POST", "/livez", 405),
        ("GET", "/v2/models/m/status/x", 422),
        ("GET", "/v2/models/m/crash", 500),
        ("GET", "/readyz", 503),
    ],
)
def test_every_response_has_the_id_and_the_security_headers(method, path, status):
    answer = wrap().ask(path, method=method, x_request_id="mine")
    assert answer.status_code == status
    headers = {
        name: answer.headers[name]
        for name in answer.headers
        if name not in ("content-length", "content-type")
    }
    assert headers == {
        "x-request-id": "mine",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
        "cache-control": "no-store",
        "cross-origin-resource-policy": "same-origin",
    } | ({"allow": "GET"} if status == 405 else {})


def test_a_header_of_the_application_is_not_replaced():
    answer = wrap().ask("/echo", method="POST", content=b"x")
    assert answer.headers.get_list("content-security-policy") == ["default-src 'self'"]


@pytest.mark.parametrize("tls", [False, True])
def test_a_response_requires_tls_of_a_browser_only_over_tls(tls):
    assert ("strict-transport-security" in wrap(tls=tls).ask("/livez").headers) is tls


def test_a_request_is_logged_in_one_line_without_its_query_and_its_headers():
    wrapped = wrap(clock=iter([10.0, 10.25]).__next__)
    wrapped.ask(
        "/echo?token=secret", method="POST", content=b"12345", authorization="Bearer secret"
    )
    assert wrapped.log.lines == [
        {
            "level": "info",
            "event": "request",
            "method": "POST",
            "path": "/echo",
            "route": "/echo",
            "status": 200,
            "duration_ms": 250.0,
            "received_bytes": 5,
            "sent_bytes": 5,
            "client": "127.0.0.1",
        }
    ]


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v2/models/anything/infer", "/v2/models/{name}/infer"),
        ("/v2/models/other/infer", "/v2/models/{name}/infer"),
        ("/v2/models/%0a%1b[31m/infer", "/v2/models/{name}/infer"),
        ("/openapi.json", "/openapi.json"),
        ("/nothing/at/all", "unmatched"),
        ("/v2/models/m/nothing", "unmatched"),
    ],
)
def test_metrics_and_log_lines_have_the_template_of_a_path_as_its_route(path, route):
    wrapped = wrap()
    wrapped.ask(path)
    assert wrapped.counted["route"] == wrapped.line["route"] == route


def test_an_unknown_method_is_counted_as_other_with_the_route_of_its_path():
    wrapped = wrap()
    wrapped.ask("/v2/models/m/infer", method="BREW")
    assert wrapped.counted["route"] == "/v2/models/{name}/infer"
    assert wrapped.counted["method"] == "other"


@pytest.mark.parametrize("path", ["/%0d%0aforged", "/%1b[31mred", "/ü", "/" + "a" * 5000])
def test_no_path_can_forge_a_line_or_fill_the_log(path):
    wrapped = wrap()
    wrapped.ask(path)
    assert wrapped.line["path"].isascii()
    assert wrapped.line["path"].isprintable()
    assert len(wrapped.line["path"]) <= 256


@pytest.mark.parametrize(
    ("scope", "logged"),
    [
        ({"raw_path": b"/x?secret", "path": "/x"}, "/x"),
        ({"raw_path": b"/\x1b[31m\n", "path": "/x"}, "/%1B%5B31m%0A"),
        ({"path": "/\x1b[31m\n\ud83d"}, "/%1B%5B31m%0A%ED%A0%BD"),
    ],
)
def test_a_path_that_the_server_has_not_cleaned_is_logged_encoded(scope, logged):
    wrapped = wrap(answer_404)
    exchange(None, wrapped, **scope)
    assert wrapped.line["path"] == logged


async def answer_404(scope, receive, send):
    await send({"type": "http.response.start", "status": 404})
    await send({"type": "http.response.body"})


@pytest.mark.parametrize(("chance", "logged"), [(0.0, 1), (0.24, 1), (0.25, 0), (0.99, 0)])
def test_a_share_of_the_requests_is_logged_and_all_are_counted(chance, logged):
    wrapped = wrap(log_share=0.25, chance=lambda: chance)
    wrapped.ask("/v2/models/m/infer")
    assert len(wrapped.log.lines) == logged
    assert len(wrapped.metrics.ended) == 1


def test_a_failure_is_always_logged():
    wrapped = wrap(log_share=0.0)
    wrapped.ask("/v2/models/m/status/503")
    wrapped.ask("/v2/models/m/status/400")
    assert [(line["level"], line["status"]) for line in wrapped.log.lines] == [("warning", 503)]


def test_probes_are_logged_only_if_they_fail_and_are_not_counted_as_rejected():
    wrapped = wrap()
    wrapped.ask("/livez")
    assert wrapped.log.lines == []
    wrapped.ask("/readyz")
    assert wrapped.line["path"] == "/readyz"
    assert [ended["reason"] for ended in wrapped.metrics.ended] == [None, None]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/v2/models/m/infer", None),
        ("/nothing", None),
        ("/v2/models/m/status/401", "unauthorized"),
        ("/v2/models/m/status/413", "too_large"),
        ("/v2/models/m/status/422", "invalid"),
        ("/v2/models/m/status/408", "request_timeout"),
        ("/v2/models/m/status/499", "cancelled"),
        ("/v2/models/m/status/503", "not_ready"),
        ("/v2/models/full/status/503", "queue_full"),
        ("/v2/models/m/status/504", "deadline"),
        ("/v2/models/m/crash", "failed"),
    ],
)
def test_a_rejected_request_is_counted_with_its_reason(path, reason):
    wrapped = wrap()
    wrapped.ask(path)
    assert wrapped.counted["reason"] == reason
    assert wrapped.metrics.in_flight == 0


def test_a_crash_is_logged_in_full_and_answered_without_details():
    wrapped = wrap()
    answer = wrapped.ask("/v2/models/m/crash")
    assert answer.status_code == 500
    assert "crash of the tests" not in answer.text
    crashed, line = wrapped.log.lines
    assert (crashed["level"], crashed["event"]) == ("error", "request crashed")
    assert isinstance(crashed["exc_info"], ZeroDivisionError)
    assert line["status"] == 500


@pytest.mark.parametrize(
    ("path", "fields"), [("/v1/predict", {"error", "field"}), ("/v2/models/m", {"error"})]
)
def test_a_crash_that_the_application_does_not_answer_is_answered(path, fields):
    async def crash(scope, receive, send):
        raise ZeroDivisionError("inside")

    answer = wrap(crash).ask(path, x_request_id="mine")
    assert answer.status_code == 500
    assert set(answer.json()) == fields
    assert "mine" in answer.json()["error"]
    assert "inside" not in answer.text


def exchange(app: Any, wrapped: WrappedApp, **changes: Any) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []
    read: list[None] = []

    async def receive():
        if read:  # the client sends no more and does not disconnect
            await asyncio.get_running_loop().create_future()
        read.append(None)
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "headers": [],
        "query_string": b"",
        "root_path": "",
        "app": app,
    }
    asyncio.run(wrapped.app(scope | (changes or {"path": "/breaks-off"}), receive, send))
    return sent


def test_a_response_that_breaks_off_is_a_failure_whatever_its_first_status():
    app = make_app()
    wrapped = wrap(app)
    sent = exchange(app, wrapped)
    assert sent[0]["status"] == 200
    assert sent[-1]["more_body"]  # the server sees no end, so it closes the connection
    assert (wrapped.line["status"], wrapped.counted["reason"]) == (500, "failed")


def test_a_response_without_an_end_is_counted_as_cancelled():
    async def gives_up(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def is_cancelled(scope, receive, send):
        raise asyncio.CancelledError

    wrapped = wrap(gives_up)
    exchange(None, wrapped)
    stopped = wrap(is_cancelled)
    with pytest.raises(asyncio.CancelledError):
        exchange(None, stopped)
    for unfinished in (wrapped, stopped):
        assert unfinished.counted["status"] == 499
        assert unfinished.counted["reason"] == "cancelled"
        assert unfinished.metrics.in_flight == 0
