"""Parse a serialised model without its weights.

A model of gigabytes must not be copied into memory to read its nodes. So the bytes are read in
protobuf's wire format first, and the large payloads of tensors are left out. Each such tensor gets
an entry that says where its payload is. The nesting of messages is taken from onnx's descriptors.
Source: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

import onnx
from google.protobuf.descriptor import Descriptor

from evalmode.bundle.wire import BYTES, Malformed, fields
from evalmode.export.graph.errors import Broken

_PAYLOADS = frozenset(
    {"raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data"}
)
# Bytes. Smaller messages are copied as they are: looking into them costs more than it saves.
_MIN_MESSAGE = 1024
# Fields. An attribute with more of them is a list of numbers (a forest's thresholds), which
# protobuf reads faster than this code can skim it.
_MAX_FIELDS = 10_000
_MAX_DEPTH = 100  # protobuf's own limit
# Bytes of nodes, names and shapes. The largest models that we know have a tenth of it.
_MAX_REST = 256 << 20


@dataclass(frozen=True)
class Span:
    """Where a tensor's payload is in the serialised model, and which field of TensorProto it is."""

    field: str
    offset: int
    length: int


@dataclass(frozen=True)
class Skimmed:
    """A serialised model without its large payloads, and the key of the entries that name them."""

    model: bytes
    key: str

    def span(self, tensor: onnx.TensorProto) -> Span | None:
        """Where the payload is that was left out of `tensor`; None if nothing was left out.

        Raises Broken for a tensor with two payloads.
        """
        entries = [entry.value for entry in tensor.external_data if entry.key == self.key]
        if not entries:
            return None
        # Protobuf merges a message that is written in two parts, each of which may have a payload.
        if len(entries) > 1 or any(len(getattr(tensor, name)) for name in _PAYLOADS):
            raise Broken(f"the tensor {tensor.name!r} is written twice")
        name, offset, length = entries[0].split(":")
        return Span(name, int(offset), int(length))


def skim(data: memoryview) -> Skimmed:
    """The model in `data` without its large payloads. Raises Broken if it is not protobuf."""
    # A file cannot guess the key, so it cannot claim a payload at an offset of its choice.
    key = secrets.token_hex(16)
    try:
        pieces = _Skimmer(data, key).message(0, len(data), onnx.ModelProto.DESCRIPTOR, 0)
    except Malformed as error:
        raise Broken(str(error)) from error
    size = sum(map(len, pieces))
    if size > _MAX_REST:
        raise Broken(
            f"it has {size >> 20} MiB besides its weights: at most {_MAX_REST >> 20} MiB are read"
        )
    return Skimmed(b"".join(pieces), key)


def field_head(number: int, length: int) -> bytes:
    """The tag and the length that begin a length-delimited field."""
    head = bytearray()
    for value in (number << 3 | BYTES, length):
        # A varint: seven bits a byte, the lowest first; the top bit says that more bytes follow.
        while value > 127:
            head.append(value & 127 | 128)
            value >>= 7
        head.append(value)
    return bytes(head)


@dataclass
class _Skimmer:
    data: memoryview
    key: str
    _nested_types: dict[str, dict[int, Descriptor]] = field(default_factory=dict)

    def message(
        self, start: int, end: int, descriptor: Descriptor, depth: int
    ) -> list[bytes | memoryview]:
        """The message in [start, end), in pieces. They are views, so that all bytes are copied only
        once, when the pieces are joined.
        """
        if depth > _MAX_DEPTH:
            raise Broken(f"it nests more than {_MAX_DEPTH} messages deep")
        if descriptor is onnx.TensorProto.DESCRIPTOR:
            return self._tensor(start, end)

        nested = self._nested_types.get(descriptor.full_name)
        if nested is None:
            nested = {
                item.number: item.message_type
                for item in descriptor.fields
                if item.message_type is not None
            }
            self._nested_types[descriptor.full_name] = nested

        pieces: list[bytes | memoryview] = []
        copied = start  # everything before it is in the pieces
        for count, (number, wire, tag, at, stop) in enumerate(fields(self.data, start, end)):
            if count == _MAX_FIELDS and descriptor is onnx.AttributeProto.DESCRIPTOR:
                return [self.data[start:end]]
            if wire == BYTES and stop - at > _MIN_MESSAGE and number in nested:
                inner = self.message(at, stop, nested[number], depth + 1)
                length = sum(map(len, inner))
                pieces += [self.data[copied:tag], field_head(number, length), *inner]
                copied = stop
        return [*pieces, self.data[copied:end]]

    def _tensor(self, start: int, end: int) -> list[bytes | memoryview]:
        """The tensor without its payload, if it has one and the payload is in one piece."""
        payload: tuple[int, int, int, str] | None = None
        for count, (number, wire, tag, at, stop) in enumerate(fields(self.data, start, end)):
            descriptor = onnx.TensorProto.DESCRIPTOR.fields_by_number.get(number)
            if descriptor is None or descriptor.name not in _PAYLOADS:
                continue
            # Protobuf would join several pieces of a payload, so such a tensor stays as it is.
            if wire != BYTES or payload is not None or count > _MAX_FIELDS:
                return [self.data[start:end]]
            payload = tag, at, stop, descriptor.name
        if payload is None:
            return [self.data[start:end]]

        tag, at, stop, name = payload
        entry = onnx.StringStringEntryProto(
            key=self.key, value=f"{name}:{at}:{stop - at}"
        ).SerializeToString()
        number = onnx.TensorProto.DESCRIPTOR.fields_by_name["external_data"].number
        return [
            self.data[start:tag],
            field_head(number, len(entry)),
            entry,
            self.data[stop:end],
        ]
