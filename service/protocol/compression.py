"""Bodies that travel compressed: gzip, and deflate in its two spellings. Knows no tensors.

A request is decompressed piece by piece, so that its reader can stop at a limit: a small body that
would grow to gigabytes never does. The same response gives the same bytes at all times.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Literal

from evalmode.service.errors import BadRequest, UnsupportedMedia
from evalmode.service.strict_json import shown

Encoding = Literal["gzip", "deflate"]

_PIECE_BYTES = 65_536
_FED_BYTES = 16_384
_LEVEL = 6
_GZIP = zlib.MAX_WBITS | 16
_GZIP_MAGIC = b"\x1f\x8b"
_RAW_DEFLATE = -zlib.MAX_WBITS
_WINDOW_BITS: dict[Encoding, int] = {"gzip": _GZIP, "deflate": zlib.MAX_WBITS}
_ENCODINGS: dict[str, Encoding] = {"gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate"}


def encoding_of(content_encodings: Sequence[str]) -> Encoding | None:
    """The encoding that the Content-Encoding headers of a request declare; None for a plain body.

    Raises UnsupportedMedia for an encoding that is not read here, and for several: each would
    multiply what a small body can grow to.
    """
    names = [
        name
        for name in (part.strip().lower() for part in ",".join(content_encodings).split(","))
        if name not in ("", "identity")
    ]
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


def accepted(accept_encoding: str | None) -> Encoding | None:
    """The encoding to answer in: the one that the client prefers, gzip before deflate; None where
    it asks for none.
    """
    weights: dict[str, float] = {}
    for part in (accept_encoding or "").lower().split(","):
        name, _, weight = part.partition(";")
        weights[name.strip()] = _weight(weight)
    offered: tuple[Encoding, ...] = ("gzip", "deflate")
    best = max(offered, key=lambda name: weights.get(name, 0.0))
    return best if weights.get(best, 0.0) > 0 else None


def compress(body: bytes, encoding: Encoding) -> bytes:
    """The body in this encoding; no clock stands in it."""
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW_BITS[encoding])
    return compressor.compress(body) + compressor.flush()


async def decompressed(
    chunks: AsyncIterator[bytes], encoding: Encoding
) -> AsyncGenerator[bytes, None]:
    """The chunks of a body without their encoding, in pieces of at most 64 KiB.

    gzip data may consist of several members (RFC 1952, section 2.2), as `cat a.gz b.gz` writes
    them. Raises BadRequest for data that is not in this encoding, ends too early or goes on too
    long.
    """
    decompressor: zlib._Decompress | None = None
    members = 0  # that have ended
    head = b""  # of a member, as long as one byte of it is here
    async for chunk in chunks:
        data = memoryview(head + chunk)
        head = b""
        while data:
            if decompressor is None:
                if members and (encoding != "gzip" or not _GZIP_MAGIC.startswith(bytes(data[:2]))):
                    raise BadRequest(f"the body goes on after the end of its {encoding} data")
                if len(data) < 2:
                    head = bytes(data)
                    break
                decompressor = zlib.decompressobj(_window_bits(data, encoding))
            # zlib copies what it has not used. A large piece with many small members would be
            # copied as often as it has members.
            piece = data[:_FED_BYTES]
            yield _decompress(decompressor, piece, encoding)
            # At the end the tail is stale: seen in Python 3.11.
            left = decompressor.unused_data if decompressor.eof else decompressor.unconsumed_tail
            data = data[len(piece) - len(left) :]
            if decompressor.eof:
                decompressor = None
                members += 1
            await asyncio.sleep(0)  # a body that unfolds to much must not hold up the others
    while decompressor is not None and (rest := _decompress(decompressor, b"", encoding)):
        yield rest  # what the last piece left no room for
        if decompressor.eof:
            return
    if decompressor is not None or head or not members:
        raise BadRequest(f"the body ends within its {encoding} data")


def _decompress(
    decompressor: zlib._Decompress, data: bytes | memoryview, encoding: Encoding
) -> bytes:
    try:
        return decompressor.decompress(data, _PIECE_BYTES)
    except zlib.error as error:
        raise BadRequest(
            f"the body is not {encoding} data as its header content-encoding says"
        ) from error


def _window_bits(head: memoryview, encoding: Encoding) -> int:
    """`deflate` means zlib's format, and raw deflate to those who read the standard otherwise."""
    is_zlib = (
        head[0] & 0x0F == 8 and head[0] >> 4 <= 7 and int.from_bytes(head[:2], "big") % 31 == 0
    )
    return _RAW_DEFLATE if encoding == "deflate" and not is_zlib else _WINDOW_BITS[encoding]


def _weight(text: str) -> float:
    """The weight of an accepted encoding, `q=0.5`: 1 where none is given, 0 for what cannot be
    read.
    """
    key, _, value = text.strip().partition("=")
    if not key:
        return 1.0
    try:
        return float(value) if key.strip() == "q" else 0.0
    except ValueError:
        return 0.0
