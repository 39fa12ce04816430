"""From a request's bytes to its fields, or to the sentence that says what is wrong.

A body is read in chunks, so that no more than the limit is ever held.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from evalmode.service.errors import (
    BodyTooLarge,
    InvalidField,
    RequestTimeout,
    UnsupportedMedia,
)
from evalmode.service.http.v1_schemas import PredictRequest
from evalmode.service.protocol.compression import decompressed, encoding_of
from evalmode.service.settings import Settings
from evalmode.service.strict_json import SHOWN_CHARACTERS, parse_json, shown

JSON = "application/json"

# The form is what curl -d and urllib declare when nobody told them what they send.
_TAKEN_FOR_JSON = frozenset({"", JSON, "application/x-www-form-urlencoded"})


async def read_body(
    chunks: AsyncIterator[bytes],
    *,
    declared_bytes: str | None,
    max_body_bytes: int,
    silence_s: float,
) -> bytes:
    """The whole body. `declared_bytes` is the Content-Length header: too many are refused before a
    byte is read.

    Raises BodyTooLarge, and RequestTimeout when nothing more of it came for `silence_s`.
    """
    too_large = BodyTooLarge(
        f"the body is larger than the {max_body_bytes} bytes that this server reads"
    )
    if (
        declared_bytes is not None
        and declared_bytes.isdecimal()
        and int(declared_bytes) > max_body_bytes
    ):
        raise too_large
    body = bytearray()
    async for chunk in unless_silent(chunks, silence_s=silence_s):
        body += chunk
        if len(body) > max_body_bytes:
            raise too_large
    return bytes(body)


async def unless_silent(chunks: AsyncIterator[bytes], *, silence_s: float) -> AsyncIterator[bytes]:
    """The chunks of a body. Raises RequestTimeout when the next one takes longer than
    `silence_s`.
    """
    while True:
        try:
            async with asyncio.timeout(silence_s):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise RequestTimeout(
                f"nothing more of the body came for {silence_s:g} seconds"
            ) from error
        yield chunk


async def read_request(request: Request, settings: Settings) -> bytes:
    """The whole body of a request of the Open Inference Protocol, decompressed, whatever media type
    it declares; the limit holds before and after.

    Raises BadRequest, BodyTooLarge and RequestTimeout.
    """
    chunks: AsyncIterator[bytes] = request.stream()
    encoding = encoding_of(request.headers.get("content-encoding"))
    if encoding is not None:
        chunks = decompressed(chunks, encoding)
    return await read_body(
        chunks,
        declared_bytes=request.headers.get("content-length"),
        max_body_bytes=settings.max_body_bytes,
        silence_s=settings.body_timeout_s,
    )


def require_json(content_type: str | None) -> None:
    """Refuse a body that declares to be something else; one that declares nothing may well be
    JSON.
    """
    media = (content_type or "").partition(";")[0].strip().lower()
    if media not in _TAKEN_FOR_JSON and not (
        media.startswith("application/") and media.endswith("+json")
    ):
        raise UnsupportedMedia(
            f"the body must be JSON: send content-type application/json, got {media!r}"
        )


def parse_predict(body: bytes, *, max_rows: int, max_top_k: int) -> PredictRequest:
    """The request for predictions in `body`, within this server's limits."""
    try:
        request = PredictRequest.model_validate(parse_json(body, subject="the body"))
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False)[0]) from error
    if len(request.inputs) > max_rows:
        raise InvalidField(
            f"inputs must hold at most {max_rows} texts a request, got {len(request.inputs)}",
            field="inputs",
        )
    if request.top_k > max_top_k:
        raise InvalidField(f"top_k must be at most {max_top_k}, got {request.top_k}", field="top_k")
    return request


def _invalid(error: ErrorDetails) -> InvalidField:
    """pydantic's first complaint as one sentence that names the field and the value."""
    field = ".".join(map(str, error["loc"]))[:SHOWN_CHARACTERS]
    kind, value = error["type"], shown(error["input"])
    # the latter: a key that is half an emoji, and has no loc
    if kind in ("extra_forbidden", "string_unicode"):
        known = ", ".join(PredictRequest.model_fields)
        return InvalidField(
            f"{field or value} is not a field of this request, which has {known}",
            field=field or None,
        )
    if not field:
        return InvalidField(f"the body must be a JSON object with the field inputs, got {value}")
    if kind == "missing":
        return InvalidField(f"{field} is missing", field=field)
    if kind == "is_instance_of":
        return InvalidField(f"{field} must be a string, got {value}", field=field)
    if kind == "list_type":
        return InvalidField(f"{field} must be a list of texts, got {value}", field=field)
    if kind == "too_short":
        return InvalidField(f"{field} must hold at least 1 text", field=field)
    complaint = error["msg"].replace("Input should", "must")
    return InvalidField(f"{field} {complaint}, got {value}", field=field)
