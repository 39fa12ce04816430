"""Compressed bodies: gzip, and deflate in both of its formats.

A request is decompressed in pieces, so that its reader can stop at a limit before a small body has
grown to gigabytes. A response is compressed without a time stamp: equal responses are equal bytes.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from typing import Literal

from evalmode.service.errors import BadRequest, UnsupportedMedia
from evalmode.service.strict_json import shown

Encoding = Literal["gzip", "deflate"]

# The largest output of one step, which is what a reader holds beyond its limit.
_OUTPUT_BYTES = 65_536

# The largest input of one step. zlib copies what it does not use, so a large piece with many small
# gzip members would be copied as often as it has members.
_INPUT_BYTES = 16_384

# zlib's default level: on JSON and on text, 9 takes 2 to 6 times as long and saves under 1 %.
_LEVEL = 6

# How `zlib` selects a format: 15 window bits are zlib's, 16 more are gzip's, and a negative number
# is raw deflate without a header.
_WINDOW_BITS: dict[Encoding, int] = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
_RAW_DEFLATE_BITS = -zlib.MAX_WBITS

_GZIP_MAGIC = b"\x1f\x8b"

# x-gzip is the older name of gzip, which RFC 9110, section 8.4.1.3, asks recipients to accept.
_ENCODINGS: dict[str, Encoding] = {"gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate"}


def declared_encoding(content_encodings: Sequence[str]) -> Encoding | None:
    """The encoding that the Content-Encoding headers of a request declare; None for a plain body.

    Raises UnsupportedMedia for an unknown encoding, and for several: each one would multiply the
    size that a small body can grow to.
    """
    names: list[str] = []
    for part in ",".join(content_encodings).split(","):
        name = part.strip().lower()
        if name not in ("", "identity"):
            names.append(name)
    for name in names:
        if name not in _ENCODINGS:
            raise UnsupportedMedia(
                f"header content-encoding must be gzip, deflate or identity, got {shown(name)}",
                field="content-encoding",
            )
    if len(names) > 1:
        raise UnsupportedMedia(
            f"header content-encoding must name one encoding, got {shown(', '.join(names))}",
            field="content-encoding",
        )
    return _ENCODINGS[names[0]] if names else None


def accepted_encoding(accept_encoding: str | None) -> Encoding | None:
    """The encoding of the response that an Accept-Encoding header prefers; None for a plain body.

    Of equal weights gzip is chosen. A weight that is not a number counts as 0, a refusal.
    """
    weights: dict[str, float] = {"gzip": 0.0, "deflate": 0.0}
    for part in (accept_encoding or "").lower().split(","):
        name, _, parameter = part.partition(";")
        key, _, value = parameter.strip().partition("=")
        weight = 0.0
        if not key:
            weight = 1.0
        elif key.strip() == "q":
            with suppress(ValueError):
                weight = float(value)
        weights[name.strip()] = weight
    encoding: Encoding = "deflate" if weights["deflate"] > weights["gzip"] else "gzip"
    return encoding if weights[encoding] > 0 else None


def compress(body: bytes, encoding: Encoding) -> bytes:
    """The body in this encoding. The gzip header that zlib writes has no time stamp."""
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW_BITS[encoding])
    return compressor.compress(body) + compressor.flush()


async def decompress(
    chunks: AsyncIterator[bytes], encoding: Encoding
) -> AsyncGenerator[bytes, None]:
    """The decompressed body of these chunks, in pieces of limited size.

    gzip data may consist of several members (RFC 1952, section 2.2), as `cat a.gz b.gz` writes
    them. Raises BadRequest for data in another format, for data that ends too early, and for
    anything after its end.
    """
    decompressor: zlib._Decompress | None = None  # of the current member
    ended_members = 0
    head = b""  # the first byte of a member, while the second one has not arrived

    async for chunk in chunks:
        data = memoryview(head + chunk)
        head = b""
        while data:
            if decompressor is None:
                # After a member only another gzip member may follow.
                if ended_members and (
                    encoding != "gzip" or not _GZIP_MAGIC.startswith(bytes(data[:2]))
                ):
                    raise BadRequest(f"the body goes on after the end of its {encoding} data")
                # The first two bytes tell the format.
                if len(data) < 2:
                    head = bytes(data)
                    break
                decompressor = zlib.decompressobj(_window_bits(data, encoding))
            piece = data[:_INPUT_BYTES]
            yield _next_output(decompressor, piece, encoding)
            if decompressor.eof:
                # `unconsumed_tail` is stale at the end of a member, seen in Python 3.11.
                unused = decompressor.unused_data
                decompressor = None
                ended_members += 1
            else:
                unused = decompressor.unconsumed_tail
            data = data[len(piece) - len(unused) :]
            # A chunk that grows to gigabytes must not block the event loop for other requests.
            await asyncio.sleep(0)

    # The last piece may have filled the output and left more inside of zlib.
    while decompressor is not None:
        output = _next_output(decompressor, b"", encoding)
        if not output:
            break
        yield output
        if decompressor.eof:
            return
    if decompressor is not None or head or not ended_members:
        raise BadRequest(f"the body ends within its {encoding} data")


def _next_output(
    decompressor: zlib._Decompress, data: bytes | memoryview, encoding: Encoding
) -> bytes:
    try:
        return decompressor.decompress(data, _OUTPUT_BYTES)
    except zlib.error as error:
        raise BadRequest(
            f"the body is not {encoding} data as its header content-encoding says"
        ) from error


def _window_bits(head: memoryview, encoding: Encoding) -> int:
    """The format of data that begins with `head`, as `zlib.decompressobj` takes it.

    `deflate` means zlib's format (RFC 9110, section 8.4.1.2), but some clients send raw deflate.
    The two bytes of zlib's header (RFC 1950, section 2.2) tell them apart: method 8, a window of
    at most 32 KiB, and a checksum modulo 31.
    """
    if encoding == "deflate":
        method, window = head[0] & 0x0F, head[0] >> 4
        if method != 8 or window > 7 or int.from_bytes(head[:2], "big") % 31 != 0:
            return _RAW_DEFLATE_BITS
    return _WINDOW_BITS[encoding]
