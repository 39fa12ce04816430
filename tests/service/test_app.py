"""The application in this process: what does not need a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace

import httpx
import pytest
from structlog.testing import capture_logs

from evalmode.service.app import create_app
from evalmode.service.errors import RunFailed
from evalmode.service.predictor import Prediction, Predictor, Scored
from evalmode.service.schemas import PredictRequest, PredictResponse
from evalmode.service.settings import Settings


class Failing:
    """A predictor whose model fails as it is told to."""

    bundle = SimpleNamespace(manifest=SimpleNamespace(name="failing", version="1"), digest="0" * 64)

    def __init__(self, failure: Exception) -> None:
        self.failure = failure
        self.closed = False

    async def predict_async(self, texts, *, top_k, truncate) -> list[Prediction]:
        if texts == ["good"]:
            return [Prediction(top=(Scored(label="a", score=0.1),), truncated=False)]
        raise self.failure

    def close(self) -> None:
        self.closed = True


def asked(app, *requests: Callable[[httpx.AsyncClient], object], started: bool = True) -> list[httpx.Response]:
    """The answers of an app to requests made one after the other."""

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            if not started:
                return [await request(client) for request in requests]
            async with app.router.lifespan_context(app):
                return [await request(client) for request in requests]

    return asyncio.run(ask())


def predict(*texts: str) -> Callable[[httpx.AsyncClient], object]:
    return lambda client: client.post("/v1/predict", json={"inputs": texts})


@pytest.mark.parametrize("path", ["/readyz", "/v1/model"])
def test_before_a_model_is_loaded_it_is_live_and_not_ready(path):
    live, ready, predicted = asked(
        create_app(Settings()),
        lambda client: client.get("/livez"),
        lambda client: client.get(path),
        predict("a"),
        started=False,
    )
    assert live.status_code == 200
    assert ready.status_code == predicted.status_code == 503
    assert ready.json() == {"error": "no model is loaded: the server is starting or stopping", "field": None}


def test_a_failing_model_answers_500_without_its_inside_and_the_next_request_is_answered():
    failure = RunFailed("the model failed on the rows of this request")
    failure.__cause__ = MemoryError("secret")
    app = create_app(Settings(), open_predictor=lambda _: Failing(failure))
    with capture_logs() as logged:
        bad, good = asked(app, predict("bad"), predict("good"))
    assert [(event["event"], event["exc_info"]) for event in logged] == [("request failed", failure)]
    assert bad.status_code == 500
    assert bad.json() == {"error": "the model failed on the rows of this request", "field": None}
    assert good.json()["predictions"] == [
        {"label": "a", "score": 0.1, "truncated": False, "top": [{"label": "a", "score": 0.1}]}
    ]


def test_a_bug_answers_500_in_the_same_shape_and_shows_nothing_of_it():
    app = create_app(Settings(), open_predictor=lambda _: Failing(ZeroDivisionError("secret")))
    bad, good = asked(app, predict("bad"), predict("good"))
    assert bad.status_code == 500
    assert bad.json() == {"error": "the server failed on this request; its log says why", "field": None}
    assert "secret" not in bad.text
    assert good.status_code == 200


def test_the_predictor_is_closed_when_the_application_stops():
    predictor = Failing(RuntimeError())
    asked(create_app(Settings(), open_predictor=lambda _: predictor), predict("good"))
    assert predictor.closed


def test_by_itself_the_application_opens_the_bundle_of_its_settings(bundle):
    (answer,) = asked(create_app(Settings(bundle=bundle)), predict("a"))
    with Predictor.open(bundle) as predictor:
        assert answer.json()["model"]["digest"] == predictor.bundle.digest
        assert answer.json()["predictions"][0]["score"] == predictor.predict(["a"])[0].score


def test_its_description_shows_examples_limits_and_every_error(bundle):
    settings = Settings(max_rows=7, max_top_k=9)
    description, docs = asked(
        create_app(settings),
        lambda client: client.get("/openapi.json"),
        lambda client: client.get("/docs"),
        started=False,
    )
    assert docs.status_code == 404  # it would load its scripts from a CDN
    operation = description.json()["paths"]["/v1/predict"]["post"]
    request = operation["requestBody"]["content"]["application/json"]["schema"]
    assert request["properties"]["inputs"]["maxItems"] == 7
    assert request["properties"]["inputs"]["items"] == {"type": "string"}
    assert request["properties"]["top_k"]["maximum"] == 9
    assert {"200", "400", "413", "415", "422", "500", "503"} == set(operation["responses"])
    response = operation["responses"]["200"]["content"]["application/json"]["schema"]
    assert response == {"$ref": "#/components/schemas/PredictResponse"}
    for example in request["examples"]:
        PredictRequest.model_validate(example)
    answers = description.json()["components"]["schemas"]["PredictResponse"]["examples"]
    for example in answers:
        PredictResponse.model_validate_json(json.dumps(example))


def test_importing_the_application_starts_nothing():
    app = create_app(Settings(bundle="does-not-exist"))
    assert app.state.predictor is None
