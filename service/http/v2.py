"""The route of inference, of the Open Inference Protocol v2.

Every response of /v2 other than 200 is `{"error": sentence}`. A request that is wrong in any way is
400, and the sentence names the field. A body that is too large is 413, and one in an unknown
content encoding 415.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from evalmode.service.components import components_of
from evalmode.service.http import v2_models
from evalmode.service.http.body import JSON, read_request_body
from evalmode.service.http.deadline import cancel_on_disconnect, request_timeout_s
from evalmode.service.http.v2_inference import (
    PreparedRequest,
    only_input,
    output_tensors,
    prepare,
)
from evalmode.service.protocol.compression import accepted_encoding, compress
from evalmode.service.protocol.metadata import ErrorBody
from evalmode.service.protocol.request import (
    JSON_LENGTH_HEADER,
    InferRequest,
    parse_infer_request,
)
from evalmode.service.protocol.response import EncodedResponse, encode_response
from evalmode.service.protocol.schemas import INFER_REQUEST, INFER_RESPONSE
from evalmode.service.settings import Settings
from evalmode.service.telemetry.timings import timings_of

BINARY = "application/octet-stream"

# Reading and writing tensors takes some 10 ms for each MiB of JSON. More than this is done in a
# thread, because the event loop would not answer other requests meanwhile.
_INLINE_BYTES = 8_192

_REFUSALS = (400, 401, 404, 408, 413, 415, 500, 503, 504)

Result = TypeVar("Result")


def routes(settings: Settings) -> APIRouter:
    """All routes of `/v2`."""
    router = APIRouter(generate_unique_id_function=lambda route: route.name)
    # First, because these have fixed paths where the routes below have the name of a model.
    # Not with `include_router`, which would build them again at the first request.
    router.routes.extend(v2_models.routes(settings).routes)

    responses: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "The outputs.",
            "content": {JSON: {"schema": INFER_RESPONSE}, BINARY: {"schema": {}}},
        }
    }
    for status in _REFUSALS:
        responses[status] = {"model": ErrorBody}
    # FastAPI would parse a JSON body itself, but JSON with raw bytes behind it is no media type
    # that it knows. So the handler reads the body, and the schema is written down here.
    request_body = {
        "required": True,
        "content": {
            JSON: {"schema": INFER_REQUEST},
            BINARY: {"schema": {"type": "string", "format": "binary"}},
        },
    }
    for name, path in (("v2_infer", ""), ("v2_infer_version", "/versions/{version}")):
        router.add_api_route(
            f"/v2/models/{{model}}{path}/infer",
            infer,
            methods=["POST"],
            name=name,
            tags=["Open Inference Protocol"],
            response_class=Response,
            responses=responses,
            openapi_extra={"requestBody": request_body},
        )
    return router


async def infer(request: Request, model: str, version: str | None = None) -> Response:
    """Run a model on texts, as the input `text`, or on tensors of its graph.

    The same row gets the same bits, whatever other rows are in this request or in others. The body
    is JSON, or JSON followed by raw little-endian tensors; the header
    `Inference-Header-Content-Length` is then the length of the JSON.
    """
    components = components_of(request)
    settings = components.settings
    timings = timings_of(request.scope)
    started = time.monotonic()

    timeout_s = request_timeout_s(request.headers, longest_s=settings.timeout_s)
    body = await read_request_body(request, settings)
    served_model = components.repository.get(model, version)
    timings.model, timings.version = served_model.name, served_model.version
    timings.read_s = time.monotonic() - started

    def parse() -> tuple[InferRequest, PreparedRequest]:
        infer_request = parse_infer_request(
            body,
            json_length=request.headers.get(JSON_LENGTH_HEADER),
            max_top_k=settings.max_top_k,
            only_input=only_input(served_model),
        )
        return infer_request, prepare(served_model, infer_request, max_rows=settings.max_rows)

    async def answer() -> EncodedResponse:
        # From the body to rows.
        parsing_started = time.monotonic()
        infer_request, prepared = await _run(parse, nbytes=len(body))
        now = timings.encoded(prepared.jobs, since=parsing_started)

        # From rows to answers, within the shortest of the setting, the header and the parameter.
        deadline = started + timeout_s
        if infer_request.timeout_s is not None:
            deadline = min(deadline, started + infer_request.timeout_s)
        answers = await components.answer(prepared.jobs, timings=timings, timeout_s=deadline - now)

        # From answers to the body of the response.
        writing_started = time.monotonic()

        def encode() -> EncodedResponse:
            return encode_response(
                output_tensors(prepared, answers),
                model_name=served_model.name,
                model_version=served_model.version,
                request_id=infer_request.id,
                digest=served_model.digest,
            )

        nbytes = 0
        for tensors in answers:
            for tensor in tensors.values():
                nbytes += tensor.nbytes
        encoded = await _run(encode, nbytes=nbytes)
        timings.written(since=writing_started)
        return encoded

    try:
        encoded = await cancel_on_disconnect(request, answer())
        response = await _response(encoded, accept_encoding=request.headers.get("accept-encoding"))
    except Exception:
        components.statistics.request_failed(
            served_model.name, served_model.version, took_s=time.monotonic() - started
        )
        raise
    components.statistics.request_succeeded(
        served_model.name,
        served_model.version,
        took_s=time.monotonic() - started,
        read_s=timings.encode_s or 0.0,
        write_s=timings.write_s or 0.0,
    )
    return response


async def _response(encoded: EncodedResponse, *, accept_encoding: str | None) -> Response:
    """The response, compressed if the client accepts it."""
    headers = {"vary": "accept-encoding"}
    media_type = JSON
    if encoded.json_length is not None:
        # The length counts the JSON before compression.
        headers[JSON_LENGTH_HEADER] = str(encoded.json_length)
        media_type = BINARY
    body = encoded.body
    encoding = accepted_encoding(accept_encoding)
    if encoding is not None:
        headers["content-encoding"] = encoding
        body = await _run(partial(compress, body, encoding), nbytes=len(body))
    return Response(body, media_type=media_type, headers=headers)


async def _run(work: Callable[[], Result], *, nbytes: int) -> Result:
    """The result of `work` on `nbytes` bytes, in a thread if they are many."""
    if nbytes <= _INLINE_BYTES:
        return work()
    return await asyncio.to_thread(work)
