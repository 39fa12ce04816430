"""The application in this process, without a socket."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import onnxruntime
import pytest
from structlog.testing import capture_logs

from evalmode.service.app import create_app
from evalmode.service.components import Components, open_components
from evalmode.service.errors import QueueFull, RunFailed
from evalmode.service.http.v1_schemas import PredictRequest, PredictResponse
from evalmode.service.predictor import Predictor
from evalmode.service.settings import Settings
from tests.service.bundles import make_bundle, on_another_platform, tensor_bundle


@contextmanager
def components_of(bundle: Path, **settings: object) -> Iterator[Components]:
    # A trial of a bundle takes half a second, so the bundles of the tests are opened without one.
    quick = {"load_timeout_s": 0, **settings}
    components = open_components(Settings(bundle=bundle, poll_s=0, **quick))  # type: ignore[arg-type]
    components.health.serve()
    try:
        yield components
    finally:
        components.close()


class FailingEngine:
    """An engine that fails with `failure`, unless a request has two rows."""

    def __init__(self, engine, failure: Exception) -> None:
        self.engine = engine
        self.failure = failure
        self.load = engine.load

    async def answer_async(self, jobs, *, timeout_s, timed):
        if len(jobs) == 2:
            return await self.engine.answer_async(jobs, timeout_s=timeout_s, timed=timed)
        raise self.failure

    def close(self, *, timeout_s: float) -> bool:
        return self.engine.close(timeout_s=timeout_s)


class SlowEncoding:
    """A repository whose model takes 50 ms to encode texts."""

    def __init__(self, repository) -> None:
        self.repository = repository
        self.model = repository.default_text()
        self.close = repository.close

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def default_text(self) -> SlowEncoding:
        return self

    async def text_rows_async(self, texts, *, truncate):
        await asyncio.sleep(0.05)
        return self.model.text_rows(texts, truncate=truncate)


class BlockedRepository:
    """A repository whose loads wait for `release`."""

    def __init__(self, repository) -> None:
        self.repository = repository
        self.release = threading.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self.repository, name)

    def load(self, name: str) -> None:
        assert self.release.wait(30)


class CountingTracing:
    """Tracing that counts the rows of each request."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def wrap(self, app, *, quiet):
        return app

    @contextmanager
    def following(self, rows) -> Iterator[None]:
        self.rows.append(len(list(rows)))
        yield

    def close(self) -> None:
        """Nothing is open."""


def responses_of(app, *requests: Callable[[httpx.AsyncClient], object]) -> list[httpx.Response]:
    """The responses of an app to requests, one after the other."""

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return [await request(client) for request in requests]

    return asyncio.run(ask())


def predict(*texts: str) -> Callable[[httpx.AsyncClient], object]:
    return lambda client: client.post(
        "/v1/predict", json={"inputs": texts}, headers={"x-request-id": "mine"}
    )


def infer(*texts: str) -> Callable[[httpx.AsyncClient], object]:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": list(texts)}
    return lambda client: client.post(
        "/v2/models/tiny/infer", json={"inputs": [tensor]}, headers={"x-request-id": "mine"}
    )


def test_a_failing_model_answers_500_without_internals_and_the_next_request_is_answered(bundle):
    failure = RunFailed("the model failed on the rows of this request")
    failure.__cause__ = MemoryError("secret")
    with components_of(bundle) as components, capture_logs() as logged:
        app = create_app(replace(components, engine=FailingEngine(components.engine, failure)))
        bad, v2, good = responses_of(app, predict("bad"), infer("bad"), predict("good", "good"))
    assert ("request failed", failure) in [
        (event["event"], event.get("exc_info")) for event in logged
    ]
    sentence = "the model failed on the rows of this request; request mine"
    assert (bad.status_code, bad.json()) == (500, {"error": sentence, "field": None})
    assert (v2.status_code, v2.json()) == (500, {"error": sentence})
    assert good.status_code == 200
    assert len(good.json()["predictions"]) == 2


def test_a_bug_answers_500_in_the_same_form_and_reveals_nothing(bundle):
    failure = ZeroDivisionError("secret")
    with components_of(bundle) as components, capture_logs() as logged:
        app = create_app(replace(components, engine=FailingEngine(components.engine, failure)))
        bad, v2, good = responses_of(app, predict("bad"), infer("bad"), predict("good", "good"))
    sentence = "the server failed on this request; its log says why; request mine"
    assert (bad.status_code, bad.json()) == (500, {"error": sentence, "field": None})
    assert (v2.status_code, v2.json()) == (500, {"error": sentence})
    assert "secret" not in bad.text + v2.text
    assert [event["exc_info"] for event in logged if event["event"] == "request crashed"] == [
        failure,
        failure,
    ]
    assert bad.headers["x-request-id"] == "mine"
    assert good.status_code == 200


def test_a_full_queue_says_when_to_retry_in_both_protocols(bundle):
    with components_of(bundle) as components:
        app = create_app(
            replace(
                components,
                engine=FailingEngine(components.engine, QueueFull("full", retry_after_s=7)),
            )
        )
        for answer in responses_of(app, predict("bad"), infer("bad")):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")


def test_the_answers_are_those_of_the_predictor(bundle):
    with components_of(bundle) as components:
        (answer,) = responses_of(create_app(components), predict("a"))
    with Predictor.open(bundle) as predictor:
        assert answer.json()["model"]["digest"] == predictor.model.digest
        assert answer.json()["predictions"][0]["score"] == predictor.predict(["a"])[0].score


def test_a_server_that_drains_is_live_and_not_ready(bundle):
    with components_of(bundle) as components:
        app = create_app(components)
        components.health.drain()
        live, ready, v2, prediction = responses_of(
            app,
            lambda client: client.get("/livez"),
            lambda client: client.get("/readyz"),
            lambda client: client.get("/v2/health/ready"),
            predict("a"),
        )
    assert (live.status_code, prediction.status_code) == (200, 200)
    assert (ready.status_code, ready.json()) == (
        503,
        {"error": "the server is stopping", "field": None},
    )
    assert (v2.status_code, v2.json()) == (503, {"error": "the server is stopping"})


def test_the_openapi_schema_shows_examples_limits_and_every_error(bundle):
    with components_of(bundle, max_rows=7, max_top_k=9) as components:
        (description,) = responses_of(
            create_app(components), lambda client: client.get("/openapi.json")
        )
    operation = description.json()["paths"]["/v1/predict"]["post"]
    request = operation["requestBody"]["content"]["application/json"]["schema"]
    assert request["properties"]["inputs"]["maxItems"] == 7
    assert request["properties"]["inputs"]["items"] == {"type": "string"}
    assert request["properties"]["top_k"]["maximum"] == 9
    assert "application/x-ndjson" in operation["requestBody"]["content"]
    errors = {"400", "401", "404", "408", "413", "415", "422", "500", "503", "504"}
    assert errors | {"200"} == set(operation["responses"])
    response = operation["responses"]["200"]["content"]["application/json"]["schema"]
    assert response == {"$ref": "#/components/schemas/PredictResponse"}
    for example in request["examples"]:
        PredictRequest.model_validate(example)
    answers = description.json()["components"]["schemas"]["PredictResponse"]["examples"]
    for example in answers:
        PredictResponse.model_validate_json(json.dumps(example))


@pytest.mark.parametrize("path", ["/v1/predict", "/v2/models/tiny/infer"])
def test_a_request_may_shorten_its_deadline_and_a_wrong_value_is_refused(bundle, path):
    with components_of(bundle) as components:
        (answer,) = responses_of(
            create_app(components),
            lambda client: client.post(path, headers={"x-request-timeout-ms": "-3"}),
        )
    assert answer.status_code == 400
    assert (
        'x-request-timeout-ms must be a whole number of milliseconds above 0, got "-3"'
        in answer.json()["error"]
    )


def test_the_time_to_encode_a_text_counts_towards_the_deadline(bundle):
    with components_of(bundle) as components:
        app = create_app(replace(components, repository=SlowEncoding(components.repository)))
        hurried, patient = responses_of(
            app,
            *(
                lambda client, ms=ms: client.post(
                    "/v1/predict", json={"inputs": ["a"]}, headers={"x-request-timeout-ms": ms}
                )
                for ms in ("10", "20000")
            ),
        )
    assert (hurried.status_code, patient.status_code) == (504, 200)


def test_rows_of_both_protocols_belong_to_the_trace_of_their_request(bundle):
    tracing = CountingTracing()
    with components_of(bundle) as components:
        answers = responses_of(
            create_app(replace(components, tracing=tracing)),
            predict("a", "b"),
            infer("a", "b", "c"),
        )
    assert [answer.status_code for answer in answers] == [200, 200]
    assert tracing.rows == [2, 3]


def test_a_large_request_is_answered_while_many_requests_wait_to_load_a_model(bundle):
    with components_of(bundle) as components:
        blocked = BlockedRepository(components.repository)
        app = create_app(replace(components, repository=blocked))

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://service", timeout=None
            ) as client:
                path = "/v2/repository/models/tiny/load"
                # More requests than the server has threads.
                loads = [asyncio.create_task(client.post(path)) for _ in range(40)]
                await asyncio.sleep(0.05)
                try:
                    async with asyncio.timeout(20):
                        return await predict(*["A long text. " * 100] * 20)(client)
                finally:
                    blocked.release.set()
                    await asyncio.gather(*loads)

        assert asyncio.run(ask()).status_code == 200


def test_the_model_route_describes_the_requested_model(tmp_path):
    for version in ("1", "2"):
        tensor_bundle(tmp_path, version=version)
    with components_of(tmp_path, versions=2) as components:
        paths = ("/v1/model", "/v1/model?model=tensors&version=1", "/v1/model?version=1")
        newest, first, nameless = responses_of(
            create_app(components), *(lambda client, path=path: client.get(path) for path in paths)
        )
    assert (newest.json()["version"], first.json()["version"]) == ("2", "1")
    assert (nameless.status_code, nameless.json()["field"]) == (422, "version")


def test_a_version_needs_the_name_of_its_model(bundle):
    lines = {"content": b'"a"\n', "headers": {"content-type": "application/x-ndjson"}}
    with components_of(bundle) as components:
        answers = responses_of(
            create_app(components),
            lambda client: client.post("/v1/predict", json={"inputs": ["a"], "version": "1"}),
            lambda client: client.post("/v1/predict?version=1", **lines),
            lambda client: client.get("/v1/model?version=1"),
        )
        (named,) = responses_of(
            create_app(components),
            lambda client: client.post(
                "/v1/predict", json={"inputs": ["a"], "model": "tiny", "version": "1"}
            ),
        )
    for answer in answers:
        assert (answer.status_code, answer.json()["field"]) == (422, "version")
    assert named.status_code == 200


def test_both_protocols_say_why_known_answers_agree_only_within_tolerance(tmp_path):
    make_bundle(tmp_path, certify=on_another_platform)
    with components_of(tmp_path) as components:
        v1, v2 = responses_of(
            create_app(components),
            lambda client: client.get("/v1/model"),
            lambda client: client.get("/v2/models/tiny/config"),
        )
    replayed = v1.json()["known_answers"]
    assert replayed["verdict"] == "within tolerance"
    runtime, features = replayed["differences"]
    assert runtime == {"what": "ONNX Runtime", "there": "1.0", "here": onnxruntime.__version__}
    assert (features["what"], features["there"]) == ("CPU features", "neon")
    reason = v2.json()["parameters"]["known_answers"]["string_value"]
    assert reason.startswith(
        f"within tolerance (ONNX Runtime 1.0 there, {onnxruntime.__version__} here; CPU features"
    )
