"""The application in this process: what does not need a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs

from evalmode.service.app import create_app
from evalmode.service.errors import QueueFull, RunFailed
from evalmode.service.predictor import Predictor
from evalmode.service.schemas import PredictRequest, PredictResponse
from evalmode.service.settings import Settings
from evalmode.service.state import State, open_state


@contextmanager
def state_of(bundle: Path, **settings: object) -> Iterator[State]:
    state = open_state(Settings(bundle=bundle, poll_s=0, **settings))  # type: ignore[arg-type]
    state.health.serve()
    try:
        yield state
    finally:
        state.close()


class Failing:
    """An engine that fails as it is told to, unless a request has two rows."""

    def __init__(self, engine, failure: Exception) -> None:
        self.engine = engine
        self.failure = failure
        self.load = engine.load

    async def answer_async(self, jobs, *, timeout_s):
        if len(jobs) == 2:
            return await self.engine.answer_async(jobs, timeout_s=timeout_s)
        raise self.failure

    def close(self, *, timeout_s: float) -> bool:
        return self.engine.close(timeout_s=timeout_s)


def asked(app, *requests: Callable[[httpx.AsyncClient], object]) -> list[httpx.Response]:
    """The answers of an app to requests made one after the other."""

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return [await request(client) for request in requests]

    return asyncio.run(ask())


def predict(*texts: str) -> Callable[[httpx.AsyncClient], object]:
    return lambda client: client.post("/v1/predict", json={"inputs": texts}, headers={"x-request-id": "mine"})


def infer(*texts: str) -> Callable[[httpx.AsyncClient], object]:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": list(texts)}
    return lambda client: client.post(
        "/v2/models/tiny/infer", json={"inputs": [tensor]}, headers={"x-request-id": "mine"}
    )


def test_a_failing_model_answers_500_without_its_inside_and_the_next_request_is_answered(bundle):
    failure = RunFailed("the model failed on the rows of this request")
    failure.__cause__ = MemoryError("secret")
    with state_of(bundle) as state, capture_logs() as logged:
        app = create_app(replace(state, engine=Failing(state.engine, failure)))
        bad, v2, good = asked(app, predict("bad"), infer("bad"), predict("good", "good"))
    assert ("request failed", failure) in [(event["event"], event.get("exc_info")) for event in logged]
    sentence = "the model failed on the rows of this request; request mine"
    assert (bad.status_code, bad.json()) == (500, {"error": sentence, "field": None})
    assert (v2.status_code, v2.json()) == (500, {"error": sentence})
    assert good.status_code == 200
    assert len(good.json()["predictions"]) == 2


def test_a_bug_answers_500_in_the_same_shape_and_shows_nothing_of_it(bundle):
    failure = ZeroDivisionError("secret")
    with state_of(bundle) as state, capture_logs() as logged:
        app = create_app(replace(state, engine=Failing(state.engine, failure)))
        bad, v2, good = asked(app, predict("bad"), infer("bad"), predict("good", "good"))
    sentence = "the server failed on this request; its log says why; request mine"
    assert (bad.status_code, bad.json()) == (500, {"error": sentence, "field": None})
    assert (v2.status_code, v2.json()) == (500, {"error": sentence})
    assert "secret" not in bad.text + v2.text
    assert [event["exc_info"] for event in logged if event["event"] == "request crashed"] == [failure, failure]
    assert bad.headers["x-request-id"] == "mine"
    assert good.status_code == 200


def test_a_full_queue_says_when_to_come_again_in_both_protocols(bundle):
    with state_of(bundle) as state:
        app = create_app(replace(state, engine=Failing(state.engine, QueueFull("full", retry_after_s=7))))
        for answer in asked(app, predict("bad"), infer("bad")):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")


def test_its_answers_are_those_of_the_predictor(bundle):
    with state_of(bundle) as state:
        (answer,) = asked(create_app(state), predict("a"))
    with Predictor.open(bundle) as predictor:
        assert answer.json()["model"]["digest"] == predictor.model.digest
        assert answer.json()["predictions"][0]["score"] == predictor.predict(["a"])[0].score


def test_before_it_serves_and_when_it_drains_it_is_live_and_not_ready(bundle):
    with state_of(bundle) as state:
        app = create_app(state)
        state.health.drain()
        live, ready, v2, answered = asked(
            app,
            lambda client: client.get("/livez"),
            lambda client: client.get("/readyz"),
            lambda client: client.get("/v2/health/ready"),
            predict("a"),
        )
    assert (live.status_code, answered.status_code) == (200, 200)
    assert (ready.status_code, ready.json()) == (503, {"error": "the server is stopping", "field": None})
    assert (v2.status_code, v2.json()) == (503, {"error": "the server is stopping"})


def test_its_description_shows_examples_limits_and_every_error(bundle):
    with state_of(bundle, max_rows=7, max_top_k=9) as state:
        (description,) = asked(create_app(state), lambda client: client.get("/openapi.json"))
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
def test_a_request_may_give_less_time_than_the_server_and_no_nonsense(bundle, path):
    with state_of(bundle) as state:
        (answer,) = asked(create_app(state), lambda client: client.post(path, headers={"x-request-timeout-ms": "-3"}))
    assert answer.status_code == 400
    assert "x-request-timeout-ms must be a whole number of milliseconds above 0, got '-3'" in answer.json()["error"]
