"""Bodies that travel compressed: gzip, and deflate in its two spellings. Knows no tensors.

A request is decompressed piece by piece, so that whoever reads it can stop at his limit: what a
bomb would have grown to is never made. The same response gives the same bytes at all times.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator
from typing import Literal

from evalmode.service.errors import BadRequest

Encoding = Literal["gzip", "deflate"]

_PIECE_BYTES = 65_536
_LEVEL = 6
_GZIP = zlib.MAX_WBITS | 16
_RAW_DEFLATE = -zlib.MAX_WBITS
_WINDOW_BITS: dict[Encoding, int] = {"gzip": _GZIP, "deflate": zlib.MAX_WBITS}


def encoding_of(content_encoding: str | None) -> Encoding | None:
    """The encoding that a request's header declares. Raises BadRequest for one that is not read
    here.
    """
    name = (content_encoding or "identity").strip().lower()
    if name in ("identity", ""):
        return None
    if name in ("gzip", "x-gzip"):
        return "gzip"
    if name == "deflate":
        return "deflate"
    raise BadRequest(
        f"header content-encoding must be gzip, deflate or identity, got {name[:40]!r}",
        field="content-encoding",
    )


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


async def decompressed(chunks: AsyncIterator[bytes], encoding: Encoding) -> AsyncIterator[bytes]:
    """The chunks of a body without their encoding, in pieces of at most 64 KiB. Raises BadRequest
    for what is none.
    """
    decompressor, held = None, b""
    async for chunk in chunks:
        held += chunk
        if decompressor is None:
            if len(held) < 2:
                continue
            decompressor = zlib.decompressobj(_window_bits(held, encoding))
        while held:
            if decompressor.eof:
                raise BadRequest(f"the body goes on after the end of its {encoding} data")
            yield _piece(decompressor, held, encoding)
            held = decompressor.unconsumed_tail or decompressor.unused_data
            await asyncio.sleep(0)  # a body that unfolds to much must not hold up the others
    # What the last piece left no room for comes out now.
    while (
        decompressor is not None
        and not decompressor.eof
        and (rest := _piece(decompressor, b"", encoding))
    ):
        yield rest
    if decompressor is None or not decompressor.eof:
        raise BadRequest(f"the body ends within its {encoding} data")


def _piece(decompressor: zlib._Decompress, held: bytes, encoding: Encoding) -> bytes:
    try:
        return decompressor.decompress(held, _PIECE_BYTES)
    except zlib.error as error:
        raise BadRequest(
            f"the body is not {encoding} data as its header content-encoding says"
        ) from error


def _window_bits(head: bytes, encoding: Encoding) -> int:
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
