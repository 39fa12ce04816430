"""A serialised model without its weights: the protobuf wire format is skimmed, and what is large
stays where it is.

Only the tensors' payloads are left out; a tag in each says where its payload lies. Knows which
messages nest (from onnx's own descriptors), and nothing of what they mean.
https://protobuf.dev/programming-guides/encoding/
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
_SMALL = 1024  # bytes; a message of this size is not worth looking into
_MANY = (
    10_000  # fields; a list of scalars (a forest's thresholds), which protobuf itself reads faster
)
_DEEPEST = 100  # protobuf's own limit
# bytes of nodes, names and shapes; the largest models known to us have a tenth of it
_LARGEST = 256 << 20


@dataclass(frozen=True)
class Span:
    """Where a tensor's payload lies in the serialised model, and the field of TensorProto that it
    is.
    """

    field: str
    offset: int
    length: int


@dataclass(frozen=True)
class Skimmed:
    """A serialised model whose large payloads were left out, and the key under which they are
    named.
    """

    model: bytes
    key: str

    def span(self, tensor: onnx.TensorProto) -> Span | None:
        """Where the payload that was left out of `tensor` lies; None for a tensor that is whole."""
        found = [entry.value for entry in tensor.external_data if entry.key == self.key]
        if not found:
            return None
        if len(found) > 1 or any(len(getattr(tensor, name)) for name in _PAYLOADS):
            raise Broken(f"the tensor {tensor.name!r} is written twice")
        name, offset, length = found[0].split(":")
        return Span(name, int(offset), int(length))


def skim(data: memoryview) -> Skimmed:
    """The model in `data` without its large payloads; raises Broken where the wire format is
    violated.
    """
    # A file cannot guess the key, so it cannot claim that a payload lies where it does not.
    key = secrets.token_hex(16)
    try:
        pieces = _Skimmer(data, key).message(0, len(data), onnx.ModelProto.DESCRIPTOR, 0)
    except Malformed as error:
        raise Broken(str(error)) from error
    if (size := sum(map(len, pieces))) > _LARGEST:
        raise Broken(
            f"it has {size >> 20} MiB beside its weights, at most {_LARGEST >> 20} are read"
        )
    return Skimmed(b"".join(pieces), key)


@dataclass
class _Skimmer:
    data: memoryview
    key: str
    _nested: dict[str, dict[int, Descriptor]] = field(default_factory=dict)

    def message(
        self, start: int, end: int, kind: Descriptor, depth: int
    ) -> list[bytes | memoryview]:
        """The message in [start, end), in pieces; what nothing was left out of is copied once, by
        whoever joins.
        """
        if depth > _DEEPEST:
            raise Broken(f"it nests more than {_DEEPEST} messages deep")
        if kind is onnx.TensorProto.DESCRIPTOR:
            return self._tensor(start, end)
        pieces: list[bytes | memoryview] = []
        kept, nested = start, self._messages_in(kind)
        for count, (number, wire, tag, at, stop) in enumerate(fields(self.data, start, end)):
            if count == _MANY and kind is onnx.AttributeProto.DESCRIPTOR:
                return [self.data[start:end]]
            if wire == BYTES and stop - at > _SMALL and number in nested:
                inner = self.message(at, stop, nested[number], depth + 1)
                pieces += [self.data[kept:tag], _field(number, sum(map(len, inner))), *inner]
                kept = stop
        return [*pieces, self.data[kept:end]]

    def _tensor(self, start: int, end: int) -> list[bytes | memoryview]:
        """The tensor without its payload, if it has one and it is in one piece."""
        payload: tuple[int, int, int, str] | None = None
        for count, (number, wire, tag, at, stop) in enumerate(fields(self.data, start, end)):
            known = onnx.TensorProto.DESCRIPTOR.fields_by_number.get(number)
            if known is None or known.name not in _PAYLOADS:
                continue
            # in several pieces, which protobuf may join
            if wire != BYTES or payload is not None or count > _MANY:
                return [self.data[start:end]]
            payload = tag, at, stop, known.name
        if payload is None:
            return [self.data[start:end]]
        tag, at, stop, name = payload
        entry = onnx.StringStringEntryProto(
            key=self.key, value=f"{name}:{at}:{stop - at}"
        ).SerializeToString()
        number = onnx.TensorProto.DESCRIPTOR.fields_by_name["external_data"].number
        return [self.data[start:tag], _field(number, len(entry)), entry, self.data[stop:end]]

    def _messages_in(self, kind: Descriptor) -> dict[int, Descriptor]:
        if kind.full_name not in self._nested:
            inner = {
                item.number: item.message_type
                for item in kind.fields
                if item.message_type is not None
            }
            self._nested[kind.full_name] = inner
        return self._nested[kind.full_name]


def _field(number: int, length: int) -> bytes:
    """The head of a length-delimited field."""
    return _varint(number << 3 | BYTES) + _varint(length)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
