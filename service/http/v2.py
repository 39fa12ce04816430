"""The routes of the Open Inference Protocol v2 over REST: inference. Knows no ONNX, no batching and
no tensors.

What a client of it may rely on: every answer other than 200 is `{"error": sentence}`; whatever is
wrong with a request is 400 and names the field; a body too large is 413, and one
in an encoding that is not read here 415.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from fastapi import APIRouter, Request, Response

from evalmode.bundle.known_answers import Tensors
from evalmode.service.components import Components, components_of
from evalmode.service.http import v2_models
from evalmode.service.http.body import JSON, read_request
from evalmode.service.http.deadline import timeout_of, unless_hung_up
from evalmode.service.http.v2_inference import PreparedRequest, answered, only_input, prepare
from evalmode.service.models.model import Model
from evalmode.service.protocol.compression import accepted, compress
from evalmode.service.protocol.metadata import ErrorBody
from evalmode.service.protocol.request import JSON_LENGTH_HEADER, InferRequest, parse_infer
from evalmode.service.protocol.response import Encoded, encode_response
from evalmode.service.protocol.schemas import INFER_REQUEST, INFER_RESPONSE
from evalmode.service.settings import Settings
from evalmode.service.telemetry.timings import Timings, timings_of

BINARY = "application/octet-stream"

# Reading and writing tensors takes some 10 ms a MiB of JSON; more than this would hold the event
# loop up.
_INLINE_BYTES = 2_048

_STATUSES = (400, 401, 404, 408, 413, 415, 500, 503, 504)


def routes(settings: Settings) -> APIRouter:
    """Every route of `/v2`."""
    router = APIRouter(generate_unique_id_function=lambda route: route.name)
    # First: a fixed path there would otherwise be taken for a model's name.
    router.include_router(v2_models.routes(settings))
    body = {
        "content": {
            JSON: {"schema": INFER_REQUEST},
            BINARY: {"schema": {"type": "string", "format": "binary"}},
        }
    }
    errors: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in _STATUSES}
    outputs = {
        "description": "The outputs.",
        "content": {JSON: {"schema": INFER_RESPONSE}, BINARY: {"schema": {}}},
    }
    for name, path in (("v2_infer", ""), ("v2_infer_version", "/versions/{version}")):
        router.add_api_route(
            f"/v2/models/{{model}}{path}/infer",
            _infer,
            methods=["POST"],
            name=name,
            tags=["Open Inference Protocol"],
            response_class=Response,
            responses={200: outputs, **errors},
            # The body is read by hand: JSON with raw tensors behind it is no media type of any
            # framework.
            openapi_extra={"requestBody": {"required": True, **body}},
        )
    return router


async def _infer(request: Request, model: str, version: str | None = None) -> Response:
    """Ask a model: texts as `text`, or its graph's own tensors. The same row gets the same bits,
    whatever is beside it.

    The body is JSON, or JSON with raw little-endian tensors behind it, whose beginning the header
    `Inference-Header-Content-Length` gives.
    """
    components = components_of(request)
    started = time.monotonic()
    timeout_s = timeout_of(request.headers, longest_s=components.settings.timeout_s)
    body = await read_request(request, components.settings)
    served_model = components.repository.get(model, version)
    timings = timings_of(request.scope)
    timings.model, timings.version = served_model.name, served_model.version
    timings.read_s = time.monotonic() - started
    inference = _Inference(
        components, served_model, timings, started=started, deadline=started + timeout_s
    )
    try:
        encoded = await unless_hung_up(
            request, inference.answer(body, request.headers.get(JSON_LENGTH_HEADER))
        )
        response = await _response(encoded, accept_encoding=request.headers.get("accept-encoding"))
    except Exception:
        components.statistics.request_failed(
            served_model.name, served_model.version, took_s=time.monotonic() - started
        )
        raise
    inference.succeeded()
    return response


class _Inference:
    """One request on its way, and how long its parts took."""

    def __init__(
        self,
        components: Components,
        model: Model,
        timings: Timings,
        *,
        started: float,
        deadline: float,
    ) -> None:
        self._components = components
        self._model = model
        self._timings = timings
        self._started = started
        self._deadline = deadline

    async def answer(self, body: bytes, json_length: str | None) -> Encoded:
        """The response's body. Raises RequestError."""
        before = time.monotonic()
        if len(body) <= _INLINE_BYTES:
            request, prepared = self._read(body, json_length)
        else:
            request, prepared = await asyncio.to_thread(self._read, body, json_length)
        now = self._timings.encoded(prepared.jobs, since=before)
        deadline = min(self._deadline, self._started + (request.timeout_s or math.inf))
        answers = await self._components.answer(
            prepared.jobs, timings=self._timings, timeout_s=deadline - now
        )
        before = time.monotonic()
        if sum(tensor.nbytes for answer in answers for tensor in answer.values()) <= _INLINE_BYTES:
            encoded = self._write(request, prepared, answers)
        else:
            encoded = await asyncio.to_thread(self._write, request, prepared, answers)
        self._timings.written(since=before)
        return encoded

    def succeeded(self) -> None:
        """Tell the statistics."""
        self._components.statistics.request_succeeded(
            self._model.name,
            self._model.version,
            took_s=time.monotonic() - self._started,
            read_s=self._timings.encode_s or 0.0,
            write_s=self._timings.write_s or 0.0,
        )

    def _read(self, body: bytes, json_length: str | None) -> tuple[InferRequest, PreparedRequest]:
        settings = self._components.settings
        request = parse_infer(
            body,
            json_length=json_length,
            max_top_k=settings.max_top_k,
            only_input=only_input(self._model),
        )
        return request, prepare(self._model, request, max_rows=settings.max_rows)

    def _write(
        self, request: InferRequest, prepared: PreparedRequest, answers: list[Tensors]
    ) -> Encoded:
        return encode_response(
            answered(prepared, answers),
            model_name=self._model.name,
            model_version=self._model.version,
            request_id=request.id,
            digest=self._model.digest,
        )


async def _response(encoded: Encoded, *, accept_encoding: str | None) -> Response:
    headers = {"vary": "accept-encoding"}
    if encoded.json_length is not None:
        headers[JSON_LENGTH_HEADER] = str(encoded.json_length)
    body, encoding = encoded.body, accepted(accept_encoding)
    if encoding is not None:
        headers["content-encoding"] = encoding
        if len(body) <= _INLINE_BYTES:
            body = compress(body, encoding)
        else:
            body = await asyncio.to_thread(compress, body, encoding)
    return Response(
        body, media_type=JSON if encoded.json_length is None else BINARY, headers=headers
    )
