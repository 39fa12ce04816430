"""Tensor elements from and to raw bytes, as the binary tensor data extension transfers them.

Numbers are little-endian. An element of BYTES follows its length, an unsigned 32-bit number.
Each size that a request claims is compared with the bytes that arrived before memory is allocated.
"""

from __future__ import annotations

import struct

import numpy as np

from evalmode.service.errors import BadRequest
from evalmode.service.protocol.datatypes import BYTES, DTYPES, Array

_LENGTH = struct.Struct("<I")


def array_from_bytes(raw: memoryview, datatype: str, count: int, *, field: str) -> Array:
    """The `count` elements in `raw` as a flat array; elements of BYTES become `bytes` objects.

    Raises BadRequest, naming `field`, unless `raw` holds exactly these elements.
    """
    if datatype == BYTES:
        return np.array(_split_elements(raw, count, field=field), dtype=object)

    dtype = DTYPES[datatype]
    if len(raw) != count * dtype.itemsize:
        raise BadRequest(
            f"{field} must be {count * dtype.itemsize} bytes for {count} elements of {datatype},"
            f" got {len(raw)}",
            field=field,
        )
    if dtype.kind == "b":
        # NumPy takes any byte as a bool and keeps it: a 2 would be a third truth value.
        truth_bytes = np.frombuffer(raw, np.uint8)
        highest = truth_bytes.max(initial=0)
        if highest > 1:
            raise BadRequest(
                f"{field} must hold the bytes 0 and 1 for BOOL, got {highest}", field=field
            )
        return truth_bytes.astype(np.bool_)
    # A copy: tensors are not aligned within a body, and a view would keep the whole body in memory.
    return np.frombuffer(raw, dtype).copy()


def _split_elements(raw: memoryview, count: int, *, field: str) -> list[bytes]:
    """The `count` elements of BYTES, each of which follows its length."""
    elements: list[bytes] = []
    position = 0
    while position < len(raw) and len(elements) < count:
        start = end = position + _LENGTH.size
        if start <= len(raw):
            (length,) = _LENGTH.unpack_from(raw, position)
            end = start + length
        if end > len(raw):
            raise BadRequest(f"{field} ends within its element {len(elements)}", field=field)
        elements.append(bytes(raw[start:end]))
        position = end
    if len(elements) < count:
        raise BadRequest(f"{field} holds fewer elements than the {count} of its shape", field=field)
    if position < len(raw):
        raise BadRequest(f"{field} holds more elements than the {count} of its shape", field=field)
    return elements


def array_to_bytes(array: Array) -> bytes:
    """The elements in row-major order, as a body transfers them."""
    if not array.dtype.hasobject:
        return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    parts: list[bytes] = []
    for element in array.ravel():
        # JSON may hold half a surrogate pair, which UTF-8 does not have. "surrogatepass" writes it
        # nevertheless, so that a text comes back as it was sent.
        raw = element.encode("utf-8", "surrogatepass") if isinstance(element, str) else element
        parts += [_LENGTH.pack(len(raw)), raw]
    return b"".join(parts)
