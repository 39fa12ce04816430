"""Tensors from and to raw bytes: little-endian elements, and BYTES elements behind their lengths.
Knows no JSON.

Sizes in a request are claims: each is held against what is there before anything is made of it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from evalmode.service.errors import BadRequest
from evalmode.service.protocol.datatypes import BYTES, DTYPES, Array

_LENGTH = struct.Struct("<I")


def array_from_bytes(raw: memoryview, datatype: str, count: int, *, field: str) -> Array:
    """A flat array of `count` elements that `raw` holds, nothing less and nothing more.

    It is a copy of its own: what stands in a body is not aligned, and the body should not live as
    long as its tensors.
    """
    if datatype == BYTES:
        return np.array(_split(raw, count, field=field), dtype=object)
    dtype = DTYPES[datatype]
    if len(raw) != count * dtype.itemsize:
        raise BadRequest(
            f"{field} must be {count * dtype.itemsize} bytes for {count} elements of {datatype},"
            f" got {len(raw)}",
            field=field,
        )
    if dtype.kind != "b":
        return np.frombuffer(raw, dtype).copy()
    truths = np.frombuffer(raw, np.uint8)
    if truths.max(initial=0) > 1:
        raise BadRequest(
            f"{field} must hold the bytes 0 and 1 for BOOL, got {truths.max()}", field=field
        )
    return truths.astype(np.bool_)


def bytes_of(array: Array) -> bytes:
    """The elements, row-major, as they stand on the wire."""
    if not array.dtype.hasobject:
        return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    parts = []
    for element in array.ravel():
        raw = element.encode("utf-8", "surrogatepass") if isinstance(element, str) else element
        parts += [_LENGTH.pack(len(raw)), raw]
    return b"".join(parts)


def _split(raw: memoryview, count: int, *, field: str) -> Sequence[bytes]:
    """BYTES elements: each behind its length, an unsigned 32-bit little-endian number."""
    elements: list[bytes] = []
    place = 0
    while place < len(raw) and len(elements) < count:
        start = place + _LENGTH.size
        place = start + _LENGTH.unpack_from(raw, place)[0] if start <= len(raw) else start
        if place > len(raw):
            raise BadRequest(f"{field} ends within its element {len(elements)}", field=field)
        elements.append(bytes(raw[start:place]))
    if len(elements) < count or place < len(raw):
        more = "fewer" if len(elements) < count else "more"
        raise BadRequest(
            f"{field} holds {more} elements than the {count} that the shape says", field=field
        )
    return elements
