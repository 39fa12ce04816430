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
_LEVEL = 6
_GZIP = zlib.MAX_WBITS | 16
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

    Raises BadRequest for data that is not in this encoding, ends too early or goes on too long.
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
