"""The body of a request of the Open Inference Protocol: read raw, whatever it declares to be. Knows
no route.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import Request

from evalmode.service.http.body import read_body
from evalmode.service.protocol.compression import decompressed, encoding_of
from evalmode.service.settings import Settings


async def read_request(request: Request, settings: Settings) -> bytes:
    """The whole body, decompressed; the limit holds before and after.

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
