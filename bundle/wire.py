"""The wire format of protobuf: where the fields of a serialised message lie. Nothing is copied.

Only the layout is read here: `export/graph/wire.py` and `bundle/operators.py` know the messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10  # bytes


class Malformed(ValueError):  # noqa: N818 - read as a sentence: "raise Malformed"
    """Bytes that violate the wire format; the message says where."""


# One field: its number, its wire type, and where its tag, its value and the next field begin. The
# value of a BYTES field is what follows its length. A tuple without names: a named one takes five
# times as long to make.
Field: TypeAlias = tuple[int, int, int, int, int]


def fields(data: bytes | memoryview, start: int, end: int) -> Iterator[Field]:
    """The fields of the message in [start, end), in order. Raises Malformed.

    Groups, which ONNX has never used, are malformed too.
    """
    stop = start
    while stop < end:
        tag = stop
        word, at = data[tag], tag + 1
        if word > 127:
            word, at = varint(data, tag, end)
        wire = word & 7
        if wire == BYTES:
            # Most lengths and numbers are one byte: this saves a call for each.
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
            raise Malformed(f"byte {tag} is no protobuf field")
        if word < 8:
            raise Malformed(f"byte {tag} is no protobuf field")
        if stop > end:
            raise Malformed(f"it breaks off in byte {tag}")
        yield word >> 3, wire, tag, at, stop


def varint(data: bytes | memoryview, start: int, end: int) -> tuple[int, int]:
    """The number that begins at `start`, and where it ends. Raises Malformed."""
    if start < end and data[start] < 128:
        return data[start], start + 1
    value = shift = 0
    for at in range(start, min(end, start + _LONGEST_VARINT)):
        byte = data[at]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at + 1
        shift += 7
    if end - start < _LONGEST_VARINT:
        raise Malformed(f"it breaks off in byte {end}")
    raise Malformed(f"byte {start + _LONGEST_VARINT} is no protobuf field")
