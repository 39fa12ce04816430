"""What stands around a request: its id, its figures, its line in the log, its headers, and what
failed in it.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request, Response
from starlette.responses import StreamingResponse

from evalmode.service.http.edge import Edge


class Log:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def __getattr__(self, level: str):
        return lambda event, **values: self.lines.append({"level": level, "event": event, **values})


@dataclass
class Figures:
    """Keeps what is counted."""

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
class World:
    """An edge around an application, what it counts, and what it logs."""

    app: Any
    figures: Figures
    log: Log

    def ask(
        self, path: str, *, method: str = "GET", content: bytes | None = None, **headers: str
    ) -> httpx.Response:
        async def go() -> httpx.Response:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(self.app), base_url="http://test"
            ) as client:
                spelled = {name.replace("_", "-"): value for name, value in headers.items()}
                return await client.request(method, path, headers=spelled, content=content)

        return asyncio.run(go())

    @property
    def line(self) -> dict[str, Any]:
        return [line for line in self.log.lines if line["event"] == "request"][-1]

    @property
    def counted(self) -> dict[str, Any]:
        return self.figures.ended[-1]


def world(app: Any = None, **given: Any) -> World:
    figures, log = Figures(), Log()
    return World(Edge(app or make_app(), figures=figures, log=log, **given), figures, log)


def test_an_id_that_was_sent_is_taken_seen_by_the_application_and_returned():
    answer = world().ask("/v2/models/m/infer", x_request_id="Trace-1.2:3_4")
    assert answer.headers["x-request-id"] == answer.json()["id"] == "Trace-1.2:3_4"


@pytest.mark.parametrize("shown", [None, "", " ", "a b", "a" * 129, "{}", 'a"b', "a\tb", "ü"])
def test_without_an_id_or_with_one_that_could_do_harm_one_is_made(shown):
    headers = {} if shown is None else {"x_request_id": shown.encode()}
    found = [world().ask("/v2/models/m/infer", **headers).headers["x-request-id"] for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{32}", made) for made in found)
    assert found[0] != found[1]


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
def test_every_answer_has_the_id_and_the_headers_of_security(method, path, status):
    answer = world().ask(path, method=method, x_request_id="mine")
    assert answer.status_code == status
    shown = {
        name: answer.headers[name]
        for name in answer.headers
        if name not in ("content-length", "content-type")
    }
    assert shown == {
        "x-request-id": "mine",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
        "cache-control": "no-store",
        "cross-origin-resource-policy": "same-origin",
    } | ({"allow": "GET"} if status == 405 else {})


def test_a_header_that_the_application_set_itself_stands():
    answer = world().ask("/echo", method="POST", content=b"x")
    assert answer.headers.get_list("content-security-policy") == ["default-src 'self'"]


@pytest.mark.parametrize("tls", [False, True])
def test_only_with_tls_a_browser_is_told_to_insist_on_it(tls):
    assert ("strict-transport-security" in world(tls=tls).ask("/livez").headers) is tls


def test_a_request_is_logged_in_one_line_without_its_query_and_its_headers():
    around = world(clock=iter([10.0, 10.25]).__next__)
    around.ask("/echo?token=secret", method="POST", content=b"12345", authorization="Bearer secret")
    assert around.log.lines == [
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
def test_figures_and_lines_name_the_template_of_a_path_and_never_the_path(path, route):
    around = world()
    around.ask(path)
    assert around.counted["route"] == around.line["route"] == route


def test_a_path_that_matches_with_another_method_has_its_route_and_an_odd_method_is_other():
    around = world()
    around.ask("/v2/models/m/infer", method="BREW")
    assert around.counted["route"] == "/v2/models/{name}/infer"
    assert around.counted["method"] == "other"


@pytest.mark.parametrize("path", ["/%0d%0aforged", "/%1b[31mred", "/ü", "/" + "a" * 5000])
def test_no_path_can_forge_a_line_or_fill_the_log(path):
    around = world()
    around.ask(path)
    assert around.line["path"].isascii()
    assert around.line["path"].isprintable()
    assert len(around.line["path"]) <= 256


@pytest.mark.parametrize(
    ("shown", "logged"),
    [
        ({"raw_path": b"/x?secret", "path": "/x"}, "/x"),
        ({"raw_path": b"/\x1b[31m\n", "path": "/x"}, "/%1B%5B31m%0A"),
        ({"path": "/\x1b[31m\n\ud83d"}, "/%1B%5B31m%0A%ED%A0%BD"),
    ],
)
def test_the_log_trusts_no_server_to_have_cleaned_a_path(shown, logged):
    around = world(nothing_here)
    exchanged(None, around, **shown)
    assert around.line["path"] == logged


async def nothing_here(scope, receive, send):
    await send({"type": "http.response.start", "status": 404})
    await send({"type": "http.response.body"})


@pytest.mark.parametrize(("chance", "logged"), [(0.0, 1), (0.24, 1), (0.25, 0), (0.99, 0)])
def test_a_share_of_the_requests_is_logged_and_all_are_counted(chance, logged):
    around = world(log_share=0.25, chance=lambda: chance)
    around.ask("/v2/models/m/infer")
    assert len(around.log.lines) == logged
    assert len(around.figures.ended) == 1


def test_what_fails_is_always_logged():
    around = world(log_share=0.0)
    around.ask("/v2/models/m/status/503")
    around.ask("/v2/models/m/status/400")
    assert [(line["level"], line["status"]) for line in around.log.lines] == [("warning", 503)]


def test_probes_are_logged_only_when_they_fail_and_are_no_rejected_requests():
    around = world()
    around.ask("/livez")
    assert around.log.lines == []
    around.ask("/readyz")
    assert around.line["path"] == "/readyz"
    assert [ended["reason"] for ended in around.figures.ended] == [None, None]


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
def test_a_rejected_request_is_counted_by_why(path, reason):
    around = world()
    around.ask(path)
    assert around.counted["reason"] == reason
    assert around.figures.in_flight == 0


def test_a_crash_is_answered_without_its_inside_and_logged_with_it():
    around = world()
    answer = around.ask("/v2/models/m/crash")
    assert answer.status_code == 500
    assert "crash of the tests" not in answer.text
    crashed, line = around.log.lines
    assert (crashed["level"], crashed["event"]) == ("error", "request crashed")
    assert isinstance(crashed["exc_info"], ZeroDivisionError)
    assert line["status"] == 500


@pytest.mark.parametrize(
    ("path", "fields"), [("/v1/predict", {"error", "field"}), ("/v2/models/m", {"error"})]
)
def test_where_the_application_has_no_answer_for_its_crash_there_is_one(path, fields):
    async def crashes(scope, receive, send):
        raise ZeroDivisionError("inside")

    answer = world(crashes).ask(path, x_request_id="mine")
    assert answer.status_code == 500
    assert set(answer.json()) == fields
    assert "mine" in answer.json()["error"]
    assert "inside" not in answer.text


def exchanged(app: Any, around: World, **shown: Any) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []
    read: list[None] = []

    async def receive():
        if read:  # a client that says no more and does not hang up
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
    asyncio.run(around.app(scope | (shown or {"path": "/breaks-off"}), receive, send))
    return sent


def test_an_answer_that_breaks_off_is_a_failure_though_it_began_well():
    app = make_app()
    around = world(app)
    sent = exchanged(app, around)
    assert sent[0]["status"] == 200
    assert sent[-1]["more_body"]  # the server sees no end of it, and breaks the connection
    assert (around.line["status"], around.counted["reason"]) == (500, "failed")


def test_an_answer_that_nobody_waited_for_is_counted_as_cancelled():
    async def gives_up(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def is_cancelled(scope, receive, send):
        raise asyncio.CancelledError

    around = world(gives_up)
    exchanged(None, around)
    stopped = world(is_cancelled)
    with pytest.raises(asyncio.CancelledError):
        exchanged(None, stopped)
    for found in (around, stopped):
        assert (found.counted["status"], found.counted["reason"], found.figures.in_flight) == (
            499,
            "cancelled",
            0,
        )
