"""The wire format of protobuf: where the fields of a serialised message lie, without a copy.

Only the layout is read here. `export/graph/wire.py` and `bundle/operators.py` know ONNX's messages.
Source: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

# The wire types: the lowest three bits of a tag.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

_MAX_VARINT_BYTES = 10  # 64 bits, seven in a byte


class Malformed(ValueError):  # noqa: N818 - read as a sentence: "raise Malformed"
    """Bytes that violate the wire format; the message says where."""


# One field: its number, its wire type, and the positions of its tag, of its value and of the next
# field. The value of a BYTES field begins after its length. A plain tuple, because it takes five
# times as long to make a named one.
Field: TypeAlias = tuple[int, int, int, int, int]


def fields(data: bytes | memoryview, start: int, end: int) -> Iterator[Field]:
    r"""The fields of the message in data[start:end], in order. Raises Malformed.

    Groups, wire types 3 and 4, are refused too: ONNX has never used them.

    >>> list(fields(b"\x08\x05", 0, 2))  # field 1 is the number 5, in byte 1
    [(1, 0, 0, 1, 2)]
    """
    stop = start
    while stop < end:
        tag_at = stop
        tag, at = data[tag_at], tag_at + 1
        if tag > 127:
            tag, at = varint(data, tag_at, end)
        wire = tag & 7
        if wire == BYTES:
            # Most lengths and numbers are one byte: reading it here saves a call for each field.
            if at < end and (size := data[at]) < 128:
                at += 1
            else:
                size, at = varint(data, at, end)
            stop = at + size
        elif wire == VARINT:
            stop = at + 1 if at < end and data[at] < 128 else varint(data, at, end)[1]
        elif wire == FIXED32:
            stop = at + 4
        elif wire == FIXED64:
            stop = at + 8
        else:
            raise Malformed(f"byte {tag_at} is no protobuf field")
        # Field numbers begin at 1.
        if tag < 8:
            raise Malformed(f"byte {tag_at} is no protobuf field")
        if stop > end:
            raise Malformed(f"it breaks off in byte {tag_at}")
        yield tag >> 3, wire, tag_at, at, stop


def varint(data: bytes | memoryview, start: int, end: int) -> tuple[int, int]:
    r"""The number that begins at `start`, and the position after it. Raises Malformed.

    >>> varint(b"\xac\x02", 0, 2)
    (300, 2)
    """
    if start < end and data[start] < 128:
        return data[start], start + 1
    value = shift = 0
    for at in range(start, min(end, start + _MAX_VARINT_BYTES)):
        byte = data[at]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at + 1
        shift += 7
    if end - start < _MAX_VARINT_BYTES:
        raise Malformed(f"it breaks off in byte {end}")
    raise Malformed(f"byte {start + _MAX_VARINT_BYTES} is no protobuf field")
