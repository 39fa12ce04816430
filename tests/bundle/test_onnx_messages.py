"""The fields of ONNX's messages are those of the onnx package, and have the same values."""

from __future__ import annotations

import onnx
import pytest
from google.protobuf.descriptor import FieldDescriptor

from evalmode.bundle.onnx_messages import MESSAGES, TENSOR, Ambiguous, Fields, Message, text_at
from evalmode.bundle.wire import BYTES, FIXED32, FIXED64, VARINT

WIRES: dict[int, int] = {
    **dict.fromkeys(
        [FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64,
         FieldDescriptor.TYPE_ENUM],
        VARINT,
    ),
    FieldDescriptor.TYPE_FLOAT: FIXED32,
    FieldDescriptor.TYPE_DOUBLE: FIXED64,
    **dict.fromkeys(
        [FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE],
        BYTES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.name)
def test_the_fields_of_each_message_are_those_of_onnx(message: Message) -> None:
    descriptor = getattr(onnx, message.name).DESCRIPTOR
    fields = {field.number: WIRES[field.type] for field in descriptor.fields}
    many = {field.number for field in descriptor.fields if field.is_repeated}
    assert message.numbers == {field.name: field.number for field in descriptor.fields}
    assert {number: wires[0] for number, wires in message.singular.items()} == {
        number: wire for number, wire in fields.items() if number not in many
    }
    assert {number: set(wires) for number, wires in message.repeated.items()} == {
        number: {wire, BYTES} for number, wire in fields.items() if number in many
    }


def test_values_are_read_by_the_names_of_their_fields() -> None:
    tensor = onnx.TensorProto(name="weights", dims=[2, 300], data_type=onnx.TensorProto.INT32)
    tensor.int32_data.extend([1, 1000])
    data = tensor.SerializeToString()
    fields = Fields(data, (0, len(data)), TENSOR)
    assert fields.text("name") == "weights"
    assert fields.number("data_type") == onnx.TensorProto.INT32
    assert fields.numbers("dims") == [2, 300]
    assert fields.numbers("int32_data") == [1, 1000]  # packed into one field
    assert "raw_data" not in fields
    assert (fields.text("doc_string"), fields.number("data_location")) == ("", 0)
    assert fields.has_only(("name", "dims", "data_type", "int32_data", "raw_data"))
    assert not fields.has_only(("name", "dims"))


def test_a_name_that_is_not_utf_8_is_ambiguous() -> None:
    with pytest.raises(Ambiguous, match="the name at byte 1 is not UTF-8"):
        text_at(b"a\xff", (1, 2))
