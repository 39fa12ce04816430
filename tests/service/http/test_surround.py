"""The whole edge around an application, as `create_app` puts it there: figures, API keys and CORS
with it.
"""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import structlog
from fastapi import FastAPI, Request

from evalmode.service.http.edge import Edge, surround
from evalmode.service.settings import Settings
from evalmode.service.telemetry.metrics import Metrics

KEY = "a-key-of-the-tests"
PAGE = "https://page.example"


class Surrounded:
    """An application with its edge, and what is counted there."""

    def __init__(self, **settings: Any) -> None:
        self.app = FastAPI(redirect_slashes=False)
        self.metrics = Metrics()
        self.bound: dict[str, str] = {}
        self.together = asyncio.Barrier(1)
        self.app.add_api_route("/v2/models/{name}/infer", self._infer)
        self.app.add_api_route("/v2/models/{name}/crash", self._crash)
        surround(self.app, SimpleNamespace(settings=Settings(**settings), metrics=self.metrics))

    async def _infer(self, name: str, request: Request) -> str:
        await self.together.wait()
        self.bound[request.state.request_id] = structlog.contextvars.get_contextvars()["request_id"]
        return name

    async def _crash(self, name: str) -> None:
        raise ZeroDivisionError

    async def ask_many(self, path: str, ids: list[str]) -> dict[str, Any]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://test"
        ) as client:
            await asyncio.gather(
                *(client.get(path, headers={"x-request-id": name}) for name in ids)
            )
        return structlog.contextvars.get_contextvars()

    def ask(self, path: str, *, method: str = "GET", **headers: str) -> httpx.Response:
        async def go() -> httpx.Response:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(self.app), base_url="http://test"
            ) as client:
                spelled = {name.replace("_", "-"): value for name, value in headers.items()}
                return await client.request(method, path, headers=spelled)

        return asyncio.run(go())

    @property
    def figures(self) -> list[str]:
        return self.metrics.render("")[0].decode().splitlines()


def test_the_id_is_bound_for_the_time_of_the_request_and_each_of_many_at_once_has_its_own():
    around = Surrounded()
    around.together = asyncio.Barrier(8)
    ids = [f"id-{turn}" for turn in range(8)]
    assert "request_id" not in asyncio.run(around.ask_many("/v2/models/m/infer", ids))
    assert around.bound == dict(zip(ids, ids, strict=True))


def test_the_whole_edge_stands_around_an_app_and_its_error_pages():
    around = Surrounded()
    for path, status in (
        ("/v2/models/a/infer", 200),
        ("/v2/models/b/infer", 200),
        ("/v2/models/m/crash", 500),
    ):
        answer = around.ask(path, x_request_id="mine")
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine")
    text = around.figures
    assert (
        'evalmode_requests_total{method="GET",route="/v2/models/{name}/infer",status="200"} 2.0'
        in text
    )
    assert 'evalmode_rejections_total{reason="failed"} 1.0' in text
    assert "evalmode_in_flight_requests 0.0" in text


def test_an_answer_for_want_of_a_key_has_id_headers_and_figure_too():
    around = Surrounded(api_keys=KEY)
    answer = around.ask("/v2/models/m/infer")
    assert answer.status_code == 401
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert 'evalmode_rejections_total{reason="unauthorized"} 1.0' in around.figures
    assert around.ask("/v2/models/m/infer", x_api_key=KEY).status_code == 200


def test_cross_origin_calls_are_off_by_default():
    answer = Surrounded().ask("/v2/models/m/infer", origin=PAGE)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_page_of_a_named_origin_may_ask_and_reads_the_id_and_the_refusal():
    around = Surrounded(cors_origins=(PAGE,), api_keys=KEY)
    preflight = around.ask(
        "/v2/models/m/infer",
        method="OPTIONS",
        origin=PAGE,
        access_control_request_method="POST",
        access_control_request_headers="x-api-key,x-request-timeout-ms,content-type",
    )
    assert preflight.status_code == 200  # a browser shows no key before it was allowed to
    for answer in (preflight, around.ask("/v2/models/m/infer", origin=PAGE)):
        assert answer.headers["access-control-allow-origin"] == PAGE
    assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
    assert answer.status_code == 401
    other = around.ask("/v2/models/m/infer", origin="https://other.example", x_api_key=KEY)
    assert "access-control-allow-origin" not in other.headers


def test_what_is_no_request_goes_through():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope)

    asyncio.run(Edge(app, figures=Metrics())({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == [{"type": "lifespan"}]


@pytest.mark.parametrize(
    ("path", "keys"), [("/v2/models/m/infer", {"error"}), ("/v1/predict", {"error", "field"})]
)
def test_a_page_of_another_origin_is_refused_in_the_form_of_all_errors(path, keys):
    around = Surrounded(cors_origins=(PAGE,))
    answer = around.ask(
        path, method="OPTIONS", origin="https://other.example", access_control_request_method="POST"
    )
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/json")
    assert answer.json().keys() == keys
    assert answer.json()["error"] == (
        'a page of "https://other.example" may not send this request: add its origin to setting'
        " cors_origins (--cors-origins, EVALMODE_CORS_ORIGINS), and use the methods and headers"
        " that this answer allows"
    )
    assert "access-control-allow-origin" not in answer.headers
