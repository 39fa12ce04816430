"""The routes of our own protocol: predictions of texts, and what is being served. Knows no ONNX and
no batching.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from evalmode.service.components import Components, components_of
from evalmode.service.errors import InvalidField
from evalmode.service.http.body import (
    JSON,
    media_of,
    parse_predict,
    read_request,
    require_json,
)
from evalmode.service.http.bulk import BulkQuery, Streams
from evalmode.service.http.deadline import timeout_of, unless_hung_up
from evalmode.service.http.query import parse_predict_query, single_parameters
from evalmode.service.http.v1_schemas import (
    DEFAULT_TOP_K,
    ErrorResponse,
    ModelResponse,
    PredictResponse,
    query_schema,
    request_schema,
)
from evalmode.service.models.model import Model
from evalmode.service.ndjson import MEDIA_TYPE as NDJSON
from evalmode.service.protocol.compression import encoding_of
from evalmode.service.settings import Settings
from evalmode.service.telemetry.timings import Timings, timings_of

_LINES = {
    "schema": {
        "type": "string",
        "description": (
            "A text a line, as a JSON string or as an object with `text` and, to know it again,"
            " `id`. top_k, truncate, model and version are for all lines, in the query. The answer"
            " has a line for each, in their order."
        ),
        "examples": ['"Ez egy r\u00f6vid mondat."\n{"text": "Dit is een zin.", "id": 7}\n'],
    }
}


def routes(settings: Settings) -> APIRouter:
    """`/v1/predict` and `/v1/model`."""
    body = {"schema": request_schema(max_rows=settings.max_rows, max_top_k=settings.max_top_k)}
    answers: dict[int | str, dict[str, Any]] = {
        200: {"content": {NDJSON: {"schema": {"type": "string"}}}}
    }
    router = APIRouter(generate_unique_id_function=lambda route: route.name)
    router.add_api_route(
        "/v1/predict",
        _predict,
        methods=["POST"],
        name="predict",
        response_model=PredictResponse,
        responses=answers | _refusals(400, 401, 404, 408, 413, 415, 422, 500, 503, 504),
        # The body is read by hand: within the limit, and with our own sentences for what is wrong
        # with it.
        openapi_extra={
            "parameters": query_schema(body["schema"]),
            "requestBody": {"required": True, "content": {JSON: body, NDJSON: _LINES}},
        },
    )
    refusals = _refusals(401, 404, 422, 500, 503)
    router.add_api_route(
        "/v1/model", _model, name="model", response_model=ModelResponse, responses=refusals
    )
    return router


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorResponse} for status in statuses}


async def _predict(request: Request) -> Response:
    """Classify texts. The same text gets the same bits, whatever else is asked in this request or
    beside it.

    With `content-type: application/x-ndjson` the body is a text a line, of any number, and so is
    the answer. Either body may travel with `content-encoding: gzip` or `deflate`.
    """
    components, timings = components_of(request), timings_of(request.scope)
    settings = components.settings
    query = parse_predict_query(request.query_params.multi_items(), max_top_k=settings.max_top_k)
    content_type = request.headers.get("content-type")
    if media_of(content_type) == NDJSON:
        timings.streamed = True
        streams: Streams = request.app.state.streams
        stream_query = BulkQuery(
            top_k=query.top_k or DEFAULT_TOP_K, truncate=query.truncate is not False
        )
        return streams.response(
            _model_for(components, name=query.model, version=query.version, timings=timings),
            stream_query,
            encoding=encoding_of(request.headers.getlist("content-encoding")),
        )
    require_json(content_type)
    timeout_s = timeout_of(request.headers, longest_s=settings.timeout_s)
    started = time.monotonic()
    body = await read_request(request, settings)
    body_end = time.monotonic()
    timings.read_s = body_end - started
    predict_request = parse_predict(
        body, max_rows=settings.max_rows, max_top_k=settings.max_top_k, query=query
    )
    model = _model_for(
        components, name=predict_request.model, version=predict_request.version, timings=timings
    )

    async def answered() -> Response:
        jobs, truncated = await model.text_rows_async(
            predict_request.inputs, truncate=predict_request.truncate
        )
        now = timings.encoded(jobs, since=body_end)
        # Reading and encoding took a part of the request's time.
        answers = await components.answer(
            jobs, timings=timings, timeout_s=started + timeout_s - now
        )
        before = time.monotonic()
        predictions = model.predictions(answers, truncated, top_k=predict_request.top_k)
        response = _answer(PredictResponse.of(model, predictions))
        timings.written(since=before)
        return response

    return await unless_hung_up(request, answered())


async def _model(
    request: Request, model: str | None = None, version: str | None = None
) -> Response:
    """What is being served: manifest, certificate, and how its known answers came out on this
    machine.
    """
    components = components_of(request)
    single_parameters(request.query_params.multi_items(), known=("model", "version"))
    _require_model(model, version)
    served_model = (
        components.repository.get(model, version) if model is not None else _default(components)
    )
    return _answer(
        ModelResponse.of(
            served_model,
            parallel=components.engine.load.parallel,
            workers=components.settings.workers,
        )
    )


def _model_for(
    components: Components, *, name: str | None, version: str | None, timings: Timings
) -> Model:
    _require_model(name, version)
    model = (
        components.repository.default_text()
        if name is None
        else components.repository.get(name, version)
    )
    timings.model, timings.version = model.name, model.version
    if not model.is_text:
        raise InvalidField(
            f"model {model.name} takes tensors and no texts: ask POST"
            f" /v2/models/{model.name}/infer",
            field="model",
        )
    return model


def _require_model(name: str | None, version: str | None) -> None:
    if version is not None and name is None:
        raise InvalidField("version needs a model: give model too", field="version")


def _default(components: Components) -> Model:
    models = components.repository.models()
    return (
        models[0]
        if len({model.name for model in models}) == 1
        else components.repository.default_text()
    )


def _answer(model: BaseModel) -> Response:
    # Serialised once, here; numbers are written with as many digits as it takes to read the same
    # bits back.
    return Response(model.model_dump_json(), media_type=JSON)
