"""ONNX's messages, read from a serialised model without the onnx package and without a copy.

Two programs may read unusual bytes differently: protobuf merges two graphs of one model, and a
newer version of ONNX may have a field that is not known here. ONNX Runtime must run exactly what is
checked, so such bytes are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple, TypeAlias

from evalmode.bundle.wire import BYTES, FIXED32, FIXED64, VARINT, fields, varint

Span: TypeAlias = tuple[int, int]
"""The positions in a model at which the value of a field begins and ends."""


class Ambiguous(Exception):  # noqa: N818 - read as a sentence: "raise Ambiguous"
    """Bytes that another program could read differently; the message says where they are."""


class Message(NamedTuple):
    """The fields of a kind of message.

    `numbers` are the fields' numbers by name. `singular` and `repeated` are the wire types that a
    field may have, by its number. A repeated field has two, because its numbers may be packed.
    """

    name: str
    numbers: Mapping[str, int]
    singular: Mapping[int, tuple[int, ...]]
    repeated: Mapping[int, tuple[int, ...]]


def _message(
    name: str,
    *,
    singular: Mapping[str, tuple[int, int]],
    repeated: Mapping[str, tuple[int, int]] | None = None,
) -> Message:
    """A message from the number and the wire type of each field."""
    repeated = repeated or {}
    return Message(
        name=name,
        numbers={field: number for field, (number, _) in {**singular, **repeated}.items()},
        singular={number: (wire,) for number, wire in singular.values()},
        repeated={number: tuple({wire, BYTES}) for number, wire in repeated.values()},
    )


# onnx.proto3 as of onnx 1.23; a test compares these with the descriptors of the onnx package.
# fmt: off
MODEL = _message(
    "ModelProto",
    singular={
        "ir_version": (1, VARINT), "producer_name": (2, BYTES), "producer_version": (3, BYTES),
        "domain": (4, BYTES), "model_version": (5, VARINT), "doc_string": (6, BYTES),
        "graph": (7, BYTES),
    },
    repeated={
        "opset_import": (8, BYTES), "metadata_props": (14, BYTES), "training_info": (20, BYTES),
        "functions": (25, BYTES), "configuration": (26, BYTES),
    },
)
GRAPH = _message(
    "GraphProto",
    singular={"name": (2, BYTES), "doc_string": (10, BYTES)},
    repeated={
        "node": (1, BYTES), "initializer": (5, BYTES), "input": (11, BYTES), "output": (12, BYTES),
        "value_info": (13, BYTES), "quantization_annotation": (14, BYTES),
        "sparse_initializer": (15, BYTES), "metadata_props": (16, BYTES),
    },
)
NODE = _message(
    "NodeProto",
    singular={
        "name": (3, BYTES), "op_type": (4, BYTES), "doc_string": (6, BYTES), "domain": (7, BYTES),
        "overload": (8, BYTES),
    },
    repeated={
        "input": (1, BYTES), "output": (2, BYTES), "attribute": (5, BYTES),
        "metadata_props": (9, BYTES), "device_configurations": (10, BYTES),
    },
)
ATTRIBUTE = _message(
    "AttributeProto",
    singular={
        "name": (1, BYTES), "f": (2, FIXED32), "i": (3, VARINT), "s": (4, BYTES), "t": (5, BYTES),
        "g": (6, BYTES), "doc_string": (13, BYTES), "tp": (14, BYTES), "type": (20, VARINT),
        "ref_attr_name": (21, BYTES), "sparse_tensor": (22, BYTES),
    },
    repeated={
        "floats": (7, FIXED32), "ints": (8, VARINT), "strings": (9, BYTES), "tensors": (10, BYTES),
        "graphs": (11, BYTES), "type_protos": (15, BYTES), "sparse_tensors": (23, BYTES),
    },
)
FUNCTION = _message(
    "FunctionProto",
    singular={
        "name": (1, BYTES), "doc_string": (8, BYTES), "domain": (10, BYTES),
        "overload": (13, BYTES),
    },
    repeated={
        "input": (4, BYTES), "output": (5, BYTES), "attribute": (6, BYTES), "node": (7, BYTES),
        "opset_import": (9, BYTES), "attribute_proto": (11, BYTES), "value_info": (12, BYTES),
        "metadata_props": (14, BYTES),
    },
)
OPSET = _message("OperatorSetIdProto", singular={"domain": (1, BYTES), "version": (2, VARINT)})
TENSOR = _message(
    "TensorProto",
    singular={
        "data_type": (2, VARINT), "segment": (3, BYTES), "name": (8, BYTES), "raw_data": (9, BYTES),
        "doc_string": (12, BYTES), "data_location": (14, VARINT),
    },
    repeated={
        "dims": (1, VARINT), "float_data": (4, FIXED32), "int32_data": (5, VARINT),
        "string_data": (6, BYTES), "int64_data": (7, VARINT), "double_data": (10, FIXED64),
        "uint64_data": (11, VARINT), "external_data": (13, BYTES), "metadata_props": (16, BYTES),
    },
)
SPARSE = _message(
    "SparseTensorProto",
    singular={"values": (1, BYTES), "indices": (2, BYTES)},
    repeated={"dims": (3, VARINT)},
)
VALUE = _message(
    "ValueInfoProto",
    singular={"name": (1, BYTES), "type": (2, BYTES), "doc_string": (3, BYTES)},
    repeated={"metadata_props": (4, BYTES)},
)
# fmt: on
MESSAGES = (MODEL, GRAPH, NODE, ATTRIBUTE, FUNCTION, OPSET, TENSOR, SPARSE, VALUE)


class Fields:
    """The fields of one message by name: their spans in `data`, and their values.

    Raises Ambiguous for a field that ONNX does not have, and for a field that occurs twice and is
    not repeated. Raises Malformed for bytes that are not a message.
    """

    def __init__(self, data: bytes, span: Span, message: Message) -> None:
        self.data = data
        self._numbers = message.numbers
        self._spans: dict[int, list[Span]] = {}
        singular, repeated, spans = message.singular, message.repeated, self._spans
        for number, wire, tag_at, start, stop in fields(data, *span):
            if number in repeated and wire in repeated[number]:
                spans.setdefault(number, []).append((start, stop))
            elif number in singular and wire in singular[number] and number not in spans:
                spans[number] = [(start, stop)]
            elif number in spans:
                raise Ambiguous(f"byte {tag_at} repeats field {number} of a {message.name}")
            else:
                raise Ambiguous(f"byte {tag_at} begins an unknown field of a {message.name}")

    def __contains__(self, name: str) -> bool:
        return self._numbers[name] in self._spans

    def has_only(self, names: Collection[str]) -> bool:
        """Whether the message has no other fields than these, of which some may be missing."""
        return self._spans.keys() <= {self._numbers[name] for name in names}

    def spans(self, name: str) -> list[Span]:
        """The spans of a field's values, in order; empty if the message does not have the field."""
        return self._spans.get(self._numbers[name], [])

    def messages(self, name: str, message: Message) -> Iterator[Fields]:
        """The values of a field that holds messages, each read when it is reached."""
        for span in self.spans(name):
            yield Fields(self.data, span, message)

    def text(self, name: str) -> str:
        """The value of a singular field that holds text; empty if it is absent."""
        texts = self.texts(name)
        return texts[0] if texts else ""

    def texts(self, name: str) -> list[str]:
        """The values of a field that holds text."""
        return [text_at(self.data, span) for span in self.spans(name)]

    def number(self, name: str) -> int:
        """The value of a singular field that holds an integer; 0 if it is absent."""
        for span in self.spans(name):
            return varint(self.data, *span)[0]
        return 0

    def numbers(self, name: str) -> list[int]:
        """The values of a field that holds integers, one by one or packed."""
        numbers = []
        for at, stop in self.spans(name):
            while at < stop:
                number, at = varint(self.data, at, stop)
                numbers.append(number)
        return numbers


def text_at(data: bytes, span: Span) -> str:
    """The text of a field. Raises Ambiguous where it is not UTF-8."""
    start, stop = span
    try:
        return data[start:stop].decode()
    except UnicodeDecodeError:
        raise Ambiguous(f"the name at byte {start} is not UTF-8") from None
