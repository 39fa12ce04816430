"""The routes of /v1: predictions of texts, and the description of a model."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from evalmode import DEFAULT_TOP_K
from evalmode.service.components import components_of
from evalmode.service.errors import InvalidField
from evalmode.service.http.body import (
    JSON,
    media_type_of,
    read_request_body,
    require_json_type,
)
from evalmode.service.http.deadline import cancel_on_disconnect, request_timeout_s
from evalmode.service.http.streams import StreamOptions, Streams
from evalmode.service.http.v1_request import (
    NO_OPTIONS,
    PredictQuery,
    parse_predict_query,
    parse_predict_request,
    unique_parameters,
)
from evalmode.service.http.v1_schemas import (
    ErrorResponse,
    ModelResponse,
    PredictResponse,
    predict_json,
    query_schema,
    request_schema,
)
from evalmode.service.models.model import Model
from evalmode.service.ndjson import MEDIA_TYPE as NDJSON
from evalmode.service.protocol.compression import declared_encoding
from evalmode.service.settings import Settings
from evalmode.service.telemetry.timings import timings_of

_LINES = {
    "schema": {
        "type": "string",
        "description": (
            "One text a line: a JSON string, or an object with `text` and an optional `id`, which"
            " its answer repeats. top_k, truncate, model and version are in the query, for all"
            " lines. The answer has a line for each text, in their order."
        ),
        "examples": ['"Ez egy r\u00f6vid mondat."\n{"text": "Dit is een zin.", "id": 7}\n'],
    }
}


def routes(settings: Settings) -> APIRouter:
    """`/v1/predict` and `/v1/model`."""
    router = APIRouter(generate_unique_id_function=lambda route: route.name)

    schema = request_schema(max_rows=settings.max_rows, max_top_k=settings.max_top_k)
    responses = _refusals(400, 401, 404, 408, 413, 415, 422, 500, 503, 504)
    responses[200] = {"content": {NDJSON: {"schema": {"type": "string"}}}}
    router.add_api_route(
        "/v1/predict",
        predict,
        methods=["POST"],
        name="predict",
        response_model=PredictResponse,
        responses=responses,
        # The handler reads the body itself, within the limits and with our own error messages. So
        # FastAPI does not know the schema, and it is written down here.
        openapi_extra={
            "parameters": query_schema(schema),
            "requestBody": {
                "required": True,
                "content": {JSON: {"schema": schema}, NDJSON: _LINES},
            },
        },
    )
    router.add_api_route(
        "/v1/model",
        describe_model,
        name="model",
        response_model=ModelResponse,
        responses=_refusals(401, 404, 422, 500, 503),
    )
    return router


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorResponse} for status in statuses}


async def predict(request: Request) -> Response:
    """Classify texts. The same text gets the same bits, whatever else is in this request or others.

    With `content-type: application/x-ndjson` the body is one text a line, without a limit on their
    number, and so is the answer. Either body may have `content-encoding: gzip` or `deflate`.
    """
    query = NO_OPTIONS
    if request.scope["query_string"]:
        max_top_k = components_of(request).settings.max_top_k
        query = parse_predict_query(request.query_params.multi_items(), max_top_k=max_top_k)
    if media_type_of(request.headers.get("content-type")) == NDJSON:
        # Lines are read and predictions written at the same time.
        timings = timings_of(request.scope)
        timings.streamed = True
        model = _text_model(request, name=query.model, version=query.version)
        options = StreamOptions(
            top_k=query.top_k or DEFAULT_TOP_K, truncate=query.truncate is not False
        )
        encoding = declared_encoding(request.headers.getlist("content-encoding"))
        streams: Streams = request.app.state.streams
        return streams.response(model, options, timings=timings, encoding=encoding)
    return await _predict_json(request, query)


async def _predict_json(request: Request, query: PredictQuery) -> Response:
    """The response to a JSON body, within the deadline and while the client is connected."""
    components = components_of(request)
    settings = components.settings
    timings = timings_of(request.scope)

    require_json_type(request.headers.get("content-type"))
    timeout_s = request_timeout_s(request.headers, longest_s=settings.timeout_s)
    started = time.monotonic()
    body = await read_request_body(request, settings)
    body_end = time.monotonic()
    timings.read_s = body_end - started
    predict_request = parse_predict_request(
        body, max_rows=settings.max_rows, max_top_k=settings.max_top_k, query=query
    )
    model = _text_model(request, name=predict_request.model, version=predict_request.version)

    async def answer() -> Response:
        # From texts to rows.
        jobs, truncated = await model.text_rows_async(
            predict_request.inputs, truncate=predict_request.truncate
        )
        now = timings.encoded(jobs, since=body_end)

        # From rows to answers, in the time that reading and encoding have left.
        deadline = started + timeout_s
        answers = await components.answer(jobs, timings=timings, timeout_s=deadline - now)

        # From answers to the body of the response.
        writing_started = time.monotonic()
        predictions = model.predictions(answers, truncated, top_k=predict_request.top_k)
        response = Response(predict_json(model, predictions), media_type=JSON)
        timings.written(since=writing_started)
        return response

    return await cancel_on_disconnect(request, answer())


def _text_model(request: Request, *, name: str | None, version: str | None) -> Model:
    """The text model of this name and version, or the default one."""
    _require_model_of_version(name, version)
    repository = components_of(request).repository
    model = repository.default_text() if name is None else repository.get(name, version)
    timings = timings_of(request.scope)
    timings.model, timings.version = model.name, model.version
    if not model.is_text:
        raise InvalidField(
            f"model {model.name} takes tensors and no texts: use POST"
            f" /v2/models/{model.name}/infer",
            field="model",
        )
    return model


async def describe_model(
    request: Request, model: str | None = None, version: str | None = None
) -> Response:
    """A model's manifest, its certificate, and how its known answers compared on this machine."""
    components = components_of(request)
    unique_parameters(request.query_params.multi_items(), allowed=("model", "version"))
    _require_model_of_version(model, version)
    repository = components.repository
    if model is not None:
        served_model = repository.get(model, version)
    else:
        # The only model may be one of tensors, which is not a default for texts.
        models = repository.models()
        names = {served.name for served in models}
        served_model = models[0] if len(names) == 1 else repository.default_text()
    return _json_response(
        ModelResponse.of(
            served_model,
            parallel=components.engine.load.parallel,
            workers=components.settings.workers,
        )
    )


def _require_model_of_version(name: str | None, version: str | None) -> None:
    if version is not None and name is None:
        raise InvalidField("version needs a model: send model too", field="version")


def _json_response(record: BaseModel) -> Response:
    # FastAPI would validate the record and serialise it a second time. pydantic writes floats with
    # as many digits as it takes to read the same bits back.
    return Response(record.model_dump_json(), media_type=JSON)
