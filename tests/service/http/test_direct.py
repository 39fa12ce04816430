"""The short way to the routes of inference answers like the way through FastAPI, byte for byte."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from evalmode.service.app import create_app
from evalmode.service.http.middleware import add_middleware
from evalmode.service.telemetry.metrics import Metrics
from tests.service.bundles import make_bundle, tensor_bundle
from tests.service.protocol.mutations import random_body
from tests.service.served import Served, serving

JSON = {"content-type": "application/json"}
LINES = {"content-type": "application/x-ndjson"}
TEXT = {"inputs": ["Ez egy rövid mondat."], "model": "tiny"}
# Method, path, body, headers.
REQUESTS: list[tuple[str, str, bytes, dict[str, str]]] = [
    ("POST", "/v1/predict", json.dumps(body).encode(), JSON)
    for body in (
        TEXT,
        {**TEXT, "top_k": 2},
        {**TEXT, "top_k": 0},
        {**TEXT, "truncate": False, "inputs": ["long " * 200]},
        {**TEXT, "inputs": []},
        {**TEXT, "inputs": ["a", 3]},
        {**TEXT, "x": 1},
        {**TEXT, "model": "missing"},
        {**TEXT, "version": "9"},
        [],
    )
]
REQUESTS += [
    ("POST", "/v1/predict", b"", JSON),
    ("POST", "/v1/predict", b"{", JSON),
    ("POST", "/v1/predict", b"\xff", JSON),
    ("POST", "/v1/predict", b"x" * 70_000, JSON),
    ("POST", "/v1/predict", b"{}", {"content-type": "text/plain"}),
    ("POST", "/v1/predict", b"{}", {**JSON, "content-encoding": "br"}),
    ("POST", "/v1/predict", b"{}", {**JSON, "x-request-timeout-ms": "0"}),
    ("POST", "/v1/predict", gzip.compress(json.dumps(TEXT).encode()), {"content-encoding": "gzip"}),
    ("POST", "/v1/predict?model=tiny&top_k=1", b'"a"\n{"text": "b", "id": 7}\n', LINES),
    ("POST", "/v1/predict?model=tiny&x=1", b'"a"\n', LINES),
    ("POST", "/v1/predict?model=tiny", b"{\n", LINES),
    ("POST", "/v1/predict?model=tiny", b"\x1f\x8b", {**LINES, "content-encoding": "gzip"}),
    ("POST", "/v1/predict/", b"{}", JSON),
    ("GET", "/v1/predict", b"", {}),
    ("HEAD", "/v1/predict", b"", {}),
    ("OPTIONS", "/v1/predict", b"", {}),
    ("POST", "/v2/models/missing/infer", b"{}", JSON),
    ("POST", "/v2/models/tiny/versions/1/infer", b"{}", JSON),
    ("POST", "/v2/models/tiny/versions/9/infer", b"{}", JSON),
    ("POST", "/v2/models/t%2Finy/infer", b"{}", JSON),
    ("POST", "/v2/models//infer", b"{}", JSON),
    ("POST", "/v2/models/tiny/infer/x", b"{}", JSON),
    ("GET", "/v2/models/tiny/infer", b"", {}),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    make_bundle(root)
    tensor_bundle(root)
    with serving(root, max_body_bytes=65_536, default_model="tiny", access_log=0) as server:
        yield server


def answers_of(
    served: Served, requests: list[tuple[str, str, bytes, dict[str, str]]], *, direct: bool
) -> list[tuple[Any, ...]]:
    """Status, headers and body of each answer, without the ids of the requests."""
    app = create_app(served.components)
    if not direct:
        add_middleware(app, served.components.settings, Metrics())

    async def send_all() -> list[tuple[Any, ...]]:
        answers = []
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for method, path, body, headers in requests:
                answer = await client.request(method, path, content=body, headers=headers)
                fields = [item for item in answer.headers.multi_items() if "request-id" not in item]
                fields = [(name, value) for name, value in fields if name != "x-request-id"]
                content = re.sub(rb"request [0-9a-f]{32}", b"request ID", answer.content)
                answers.append((answer.status_code, sorted(fields), content))
        return answers

    return asyncio.run(send_all())


def test_all_kinds_of_requests_have_the_same_answers_by_both_ways(served: Served) -> None:
    direct = answers_of(served, REQUESTS, direct=True)
    plain = answers_of(served, REQUESTS, direct=False)
    for request, by_direct, by_plain in zip(REQUESTS, direct, plain, strict=True):
        assert by_direct == by_plain, request
    assert {status for status, _, _ in direct} >= {200, 400, 404, 405, 413, 415, 422}


def test_mutated_bodies_have_the_same_answers_by_both_ways(served: Served) -> None:
    chance = random.Random(11)
    requests = []
    for _ in range(400):
        body = random_body(chance)
        headers = {"accept-encoding": chance.choice(["gzip", "identity"])}
        if body.json_length is not None:
            headers["inference-header-content-length"] = body.json_length
        if body.encoding is not None:
            headers["content-encoding"] = body.encoding
        model = "tensors" if b'"x"' in body.head else "tiny"
        requests.append(("POST", f"/v2/models/{model}/infer", body.content, headers))
    direct = answers_of(served, requests, direct=True)
    assert direct == answers_of(served, requests, direct=False)
    assert {status for status, _, _ in direct} >= {200, 400}


def test_a_crash_of_a_handler_has_the_same_answer_by_both_ways(served: Served) -> None:
    broken = served.replace(repository=None)
    requests = [("POST", "/v1/predict", b'{"inputs": ["a"]}', JSON)]
    direct = answers_of(broken, requests, direct=True)
    assert direct == answers_of(broken, requests, direct=False)
    assert direct[0][0] == 500
