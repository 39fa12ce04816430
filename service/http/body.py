"""The body of a request: its media type, and its bytes within a limit of size and of time.

A body is read and decompressed in pieces, so that no more than the limit is ever held.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import Request

from evalmode.service.errors import BodyTooLarge, RequestTimeout, UnsupportedMedia
from evalmode.service.http.deadline import OwnCancellation
from evalmode.service.protocol.compression import declared_encoding, decompress
from evalmode.service.settings import Settings, setting_named
from evalmode.service.strict_json import shown, whole_number

JSON = "application/json"

# `curl -d` and urllib declare a form unless they are given another type.
_ACCEPTED_AS_JSON = frozenset({"", JSON, "application/x-www-form-urlencoded"})


def media_type_of(content_type: str | None) -> str:
    """The media type in a Content-Type header, in lower case; empty without a header."""
    return (content_type or "").partition(";")[0].strip().lower()


def is_json_type(media_type: str) -> bool:
    """Whether a media type is JSON, or based on JSON as application/ld+json."""
    return media_type == JSON or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )


def require_json_type(content_type: str | None) -> None:
    """Raise UnsupportedMedia for a body of another type. One that declares nothing may be JSON."""
    media_type = media_type_of(content_type)
    if media_type not in _ACCEPTED_AS_JSON and not is_json_type(media_type):
        raise UnsupportedMedia(
            f"the body must be JSON: send content-type {JSON}, got {shown(media_type)}",
            field="content-type",
        )


async def read_request_body(request: Request, settings: Settings) -> bytes:
    """The body of a request, decompressed as its header content-encoding says.

    The limit on its size holds before and after decompression. The media type is not looked at.
    Raises BadRequest, UnsupportedMedia, BodyTooLarge and RequestTimeout.
    """
    chunks: AsyncIterator[bytes] = request.stream()
    encoding = declared_encoding(request.headers.getlist("content-encoding"))
    if encoding is not None:
        chunks = decompress(_limit_size(chunks, max_body_bytes=settings.max_body_bytes), encoding)
    return await read_body(
        chunks,
        declared_bytes=request.headers.get("content-length"),
        max_body_bytes=settings.max_body_bytes,
        silence_s=settings.body_timeout_s,
    )


async def _limit_size(chunks: AsyncIterator[bytes], *, max_body_bytes: int) -> AsyncIterator[bytes]:
    """The chunks of a compressed body, which can be endless and yet decompress to nothing."""
    body_bytes = 0
    async for chunk in chunks:
        body_bytes += len(chunk)
        _require_size(body_bytes, max_body_bytes=max_body_bytes)
        yield chunk


async def read_body(
    chunks: AsyncIterator[bytes],
    *,
    declared_bytes: str | None,
    max_body_bytes: int,
    silence_s: float,
) -> bytes:
    """The body that consists of `chunks`.

    `declared_bytes` is the Content-Length header: if it is above the limit, nothing is read.
    Raises BodyTooLarge, and RequestTimeout if a chunk takes longer than `silence_s`.
    """
    _require_size(whole_number(declared_bytes or "") or 0, max_body_bytes=max_body_bytes)
    body = bytearray()
    cancellation = OwnCancellation()
    loop = asyncio.get_running_loop()
    arrived_s = loop.time()
    timer: asyncio.TimerHandle

    def end_silence() -> None:
        nonlocal timer
        if loop.time() < arrived_s + silence_s:
            timer = loop.call_at(arrived_s + silence_s, end_silence)
        else:
            cancellation.cancel()

    # `asyncio.timeout` does the same. Its timer would be set again for each chunk, and most bodies
    # have arrived before they are read: it took a tenth of the time of a small request.
    timer = loop.call_later(silence_s, end_silence)
    try:
        async for chunk in chunks:
            # Starlette ends each body with an empty chunk: nothing has arrived.
            if chunk:
                arrived_s = loop.time()
                body += chunk
                _require_size(len(body), max_body_bytes=max_body_bytes)
    except asyncio.CancelledError:
        if cancellation.is_cause():
            raise silence_error(silence_s) from None
        raise
    finally:
        timer.cancel()
    return bytes(body)


def silence_error(silence_s: float) -> RequestTimeout:
    """The error of a body of which nothing more arrived for `silence_s`."""
    return RequestTimeout(f"no more of the body arrived for {silence_s:g} s")


def _require_size(body_bytes: int, *, max_body_bytes: int) -> None:
    if body_bytes > max_body_bytes:
        raise BodyTooLarge(
            f"the body is larger than the {max_body_bytes} bytes that this server reads: split it,"
            f" or raise {setting_named('max_body_bytes')}"
        )
