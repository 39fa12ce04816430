"""All middleware, as `create_app` adds it: with metrics, API keys and CORS."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from evalmode.service.http.middleware import RequestMiddleware, add_middleware
from evalmode.service.settings import Settings
from evalmode.service.telemetry.logs import request_fields
from evalmode.service.telemetry.metrics import Metrics, render

KEY = "a-key-of-the-tests"
PAGE = "https://page.example"


class WrappedApp:
    """An application with its middleware and its metrics."""

    def __init__(self, **settings: Any) -> None:
        self.app = FastAPI(redirect_slashes=False)
        self.metrics = Metrics()
        self.logged_ids: dict[str, str] = {}
        self.barrier = asyncio.Barrier(1)
        self.app.add_api_route("/v2/models/{name}/infer", self._infer)
        self.app.add_api_route("/v2/models/{name}/crash", self._crash)
        add_middleware(self.app, Settings(**settings), self.metrics)

    async def _infer(self, name: str, request: Request) -> str:
        await self.barrier.wait()
        self.logged_ids[request.state.request_id] = request_fields.get()["request_id"]
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
        return request_fields.get()

    def ask(self, path: str, *, method: str = "GET", **headers: str) -> httpx.Response:
        async def send() -> httpx.Response:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(self.app), base_url="http://test"
            ) as client:
                sent_headers = {name.replace("_", "-"): value for name, value in headers.items()}
                return await client.request(method, path, headers=sent_headers)

        return asyncio.run(send())

    @property
    def metrics_lines(self) -> list[str]:
        return render(self.metrics.families(), "")[0].decode().splitlines()


def test_log_lines_of_concurrent_requests_each_have_the_id_of_their_request():
    wrapped = WrappedApp()
    wrapped.barrier = asyncio.Barrier(8)
    ids = [f"id-{index}" for index in range(8)]
    assert "request_id" not in asyncio.run(wrapped.ask_many("/v2/models/m/infer", ids))
    assert wrapped.logged_ids == dict(zip(ids, ids, strict=True))


def test_responses_and_error_pages_have_the_id_and_are_counted():
    wrapped = WrappedApp()
    for path, status in (
        ("/v2/models/a/infer", 200),
        ("/v2/models/b/infer", 200),
        ("/v2/models/m/crash", 500),
    ):
        answer = wrapped.ask(path, x_request_id="mine")
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine")
    text = wrapped.metrics_lines
    assert (
        'evalmode_requests_total{method="GET",route="/v2/models/{name}/infer",status="200"} 2.0'
        in text
    )
    assert 'evalmode_rejections_total{reason="failed"} 1.0' in text
    assert "evalmode_in_flight_requests 0.0" in text


def test_a_refusal_without_a_key_has_the_id_and_the_headers_and_is_counted():
    wrapped = WrappedApp(api_keys=KEY)
    answer = wrapped.ask("/v2/models/m/infer")
    assert answer.status_code == 401
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert 'evalmode_rejections_total{reason="unauthorized"} 1.0' in wrapped.metrics_lines
    assert wrapped.ask("/v2/models/m/infer", x_api_key=KEY).status_code == 200


def test_cross_origin_requests_are_off_by_default():
    answer = WrappedApp().ask("/v2/models/m/infer", origin=PAGE)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_page_of_an_allowed_origin_can_read_the_id_and_the_refusal():
    wrapped = WrappedApp(cors_origins=(PAGE,), api_keys=KEY)
    preflight = wrapped.ask(
        "/v2/models/m/infer",
        method="OPTIONS",
        origin=PAGE,
        access_control_request_method="POST",
        access_control_request_headers="x-api-key,x-request-timeout-ms,content-type",
    )
    assert preflight.status_code == 200  # a browser sends no key with it
    for answer in (preflight, wrapped.ask("/v2/models/m/infer", origin=PAGE)):
        assert answer.headers["access-control-allow-origin"] == PAGE
    assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
    assert answer.status_code == 401
    other = wrapped.ask("/v2/models/m/infer", origin="https://other.example", x_api_key=KEY)
    assert "access-control-allow-origin" not in other.headers


def test_anything_but_a_request_is_passed_on():
    scopes = []

    async def app(scope, receive, send):
        scopes.append(scope)

    asyncio.run(RequestMiddleware(app, metrics=Metrics())({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert scopes == [{"type": "lifespan"}]


@pytest.mark.parametrize(
    ("path", "keys"), [("/v2/models/m/infer", {"error"}), ("/v1/predict", {"error", "field"})]
)
def test_a_page_of_another_origin_is_refused_in_the_form_of_all_errors(path, keys):
    wrapped = WrappedApp(cors_origins=(PAGE,))
    answer = wrapped.ask(
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
