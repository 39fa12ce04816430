"""Media types, and bodies within their limits of size and of time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from evalmode.service.errors import BodyTooLarge, RequestTimeout, UnsupportedMedia
from evalmode.service.http.body import read_body, require_json_type


class Chunks:
    """A body in chunks, which counts the bytes that were read."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = chunks
        self.read_bytes = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            self.read_bytes += len(chunk)
            yield chunk


def read(chunks: Chunks, *, declared_bytes: str | None = None) -> bytes:
    return asyncio.run(
        read_body(aiter(chunks), declared_bytes=declared_bytes, max_body_bytes=10, silence_s=5)
    )


def test_a_body_as_large_as_the_limit_is_read():
    assert read(Chunks(b"12345", b"67890"), declared_bytes="10") == b"1234567890"


def test_a_body_that_declares_too_many_bytes_is_refused_before_one_is_read():
    chunks = Chunks(b"12345", b"678901")
    with pytest.raises(
        BodyTooLarge, match=r"10 bytes.*\(--max-body-bytes, EVALMODE_MAX_BODY_BYTES"
    ):
        read(chunks, declared_bytes="11")
    assert chunks.read_bytes == 0


def test_a_body_without_a_length_is_read_up_to_the_chunk_that_passes_the_limit():
    chunks = Chunks(b"12345", b"678901", b"more", b"and more")
    with pytest.raises(BodyTooLarge):
        read(chunks)
    assert chunks.read_bytes == 11


def test_a_body_that_pauses_too_long_is_refused():
    async def pausing() -> AsyncIterator[bytes]:
        yield b"12"
        await asyncio.Event().wait()

    with pytest.raises(RequestTimeout, match=r"no more of the body arrived for 0\.01 s"):
        asyncio.run(read_body(pausing(), declared_bytes="4", max_body_bytes=10, silence_s=0.01))


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "application/json",
        "Application/JSON; charset=utf-8",
        "application/x+json",
        "application/x-www-form-urlencoded",
    ],
)
def test_json_and_the_default_types_of_clients_are_accepted(content_type):
    require_json_type(content_type)


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "multipart/form-data", "application/x-ndjson", "application/jsonx", "json"],
)
def test_another_media_type_is_refused(content_type):
    with pytest.raises(UnsupportedMedia, match=content_type):
        require_json_type(content_type)
