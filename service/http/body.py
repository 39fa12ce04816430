"""From a request's bytes to its fields, or to the sentence that says what is wrong.

A body is read and decompressed in pieces, so that no more than the limit is ever held.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from evalmode.service.errors import (
    BodyTooLarge,
    InvalidField,
    RequestTimeout,
    UnsupportedMedia,
)
from evalmode.service.http.query import PredictQuery
from evalmode.service.http.v1_schemas import PredictRequest
from evalmode.service.protocol.compression import decompressed, encoding_of
from evalmode.service.settings import Settings, setting_named
from evalmode.service.strict_json import parse_json, shown, shown_key, whole_number

JSON = "application/json"

# `curl -d` and urllib declare a form when they are not told what they send.
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
    require_bytes(whole_number(declared_bytes or "") or 0, max_body_bytes=max_body_bytes)
    body = bytearray()
    async for chunk in unless_silent(chunks, silence_s=silence_s):
        body += chunk
        require_bytes(len(body), max_body_bytes=max_body_bytes)
    return bytes(body)


def require_bytes(body_bytes: int, *, max_body_bytes: int) -> None:
    """Raise BodyTooLarge for a body of more bytes than the limit."""
    if body_bytes > max_body_bytes:
        raise BodyTooLarge(
            f"the body is larger than the {max_body_bytes} bytes that this server reads: split it,"
            f" or raise {setting_named('max_body_bytes')}"
        )


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
    """The whole body of a request, decompressed as its header content-encoding says, whatever media
    type it declares. The limit holds before and after decompression.

    Raises BadRequest, UnsupportedMedia, BodyTooLarge and RequestTimeout.
    """
    chunks: AsyncIterator[bytes] = request.stream()
    encoding = encoding_of(request.headers.getlist("content-encoding"))
    if encoding is not None:
        packed = _within(chunks, max_body_bytes=settings.max_body_bytes)
        chunks = decompressed(packed, encoding)
    return await read_body(
        chunks,
        declared_bytes=request.headers.get("content-length"),
        max_body_bytes=settings.max_body_bytes,
        silence_s=settings.body_timeout_s,
    )


async def _within(chunks: AsyncIterator[bytes], *, max_body_bytes: int) -> AsyncIterator[bytes]:
    """The chunks of a compressed body: empty blocks decompress to nothing, however many come."""
    body_bytes = 0
    async for chunk in chunks:
        body_bytes += len(chunk)
        require_bytes(body_bytes, max_body_bytes=max_body_bytes)
        yield chunk


def media_of(content_type: str | None) -> str:
    """The media type that a Content-Type header declares, in small letters; empty for none."""
    return (content_type or "").partition(";")[0].strip().lower()


def is_json(media: str) -> bool:
    """Whether a media type is JSON, or a form of it as application/ld+json."""
    return media == JSON or (media.startswith("application/") and media.endswith("+json"))


def require_json(content_type: str | None) -> None:
    """Refuse a body that declares to be something else; one that declares nothing may well be
    JSON.
    """
    media = media_of(content_type)
    if media not in _TAKEN_FOR_JSON and not is_json(media):
        raise UnsupportedMedia(
            f"the body must be JSON: send content-type {JSON}, got {shown(media)}",
            field="content-type",
        )


def parse_predict(
    body: bytes,
    *,
    max_rows: int,
    max_top_k: int,
    query: PredictQuery = PredictQuery(),  # noqa: B008 - frozen
) -> PredictRequest:
    """The request for predictions in `body` and `query`, within this server's limits.

    A field stands in one of the two. Raises BadRequest, and InvalidField naming the field.
    """
    try:
        request = PredictRequest.model_validate(parse_json(body, subject="the body"))
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False)[0], max_top_k=max_top_k) from error
    if len(request.inputs) > max_rows:
        raise InvalidField(
            f"inputs must hold at most {max_rows} texts a request, got {len(request.inputs)}: split"
            f" them, or raise {setting_named('max_rows')}",
            field="inputs",
        )
    if request.top_k > max_top_k:
        raise InvalidField(_expected("top_k", request.top_k, max_top_k=max_top_k), field="top_k")
    options = {name: value for name, value in asdict(query).items() if value is not None}
    for name in options:
        if name in request.model_fields_set and getattr(request, name) is not None:
            raise InvalidField(
                f"{name} stands in the query and in the body: give it in one of them", field=name
            )
    return request.model_copy(update=options)


def _invalid(error: ErrorDetails, *, max_top_k: int) -> InvalidField:
    """pydantic's first complaint as one sentence that names the field and the value."""
    value = error["input"]
    if error["type"] == "extra_forbidden":
        return _unknown_field(str(error["loc"][0]))
    if not error["loc"]:
        # A key that holds half an emoji has no place in pydantic's complaint: it is the value.
        if error["type"] == "string_unicode" and isinstance(value, str):
            return _unknown_field(value)
        return InvalidField(
            f"the body must be a JSON object with the field inputs, got {shown(value)}"
        )
    field = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return InvalidField(f"{field} is missing", field=field)
    if field != "inputs" and error["loc"][0] == "inputs":
        return InvalidField(f"{field} must be a string, got {shown(value)}", field=field)
    return InvalidField(_expected(field, value, max_top_k=max_top_k), field=field)


def _unknown_field(key: str) -> InvalidField:
    known = ", ".join(PredictRequest.model_fields)
    # Half an emoji in a key cannot be sent back as text; its escape can.
    name = shown_key(key)
    return InvalidField(f"{name} is not a field of this request, which has {known}", field=name)


def _expected(field: str, value: object, *, max_top_k: int) -> str:
    expected = {
        "inputs": "must be a list of at least 1 text",
        "top_k": f"must be an integer from 1 to {max_top_k}",
        "truncate": "must be true or false",
    }
    return f"{field} {expected.get(field, 'must be a string or null')}, got {shown(value)}"
