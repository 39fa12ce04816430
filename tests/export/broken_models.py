"""Small valid models, and damaged copies of them: bytes and fields are replaced, removed or
repeated.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import TensorProto, helper, numpy_helper

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
NUMBERS = (0, 1, -1, 2, 7, 16, 100, 2**31 - 1, -(2**31), 2**40, 2**62, -(2**63))
TEXTS = ("", "x", "y", "Relu", "Dropout", "Constant", "f", "my", "ai.onnx", "é\n\0", "n" * 3000)


def _node(op: str, inputs: str, output: str = "y", **attributes: object) -> onnx.NodeProto:
    domain = "my" if op.islower() else ""
    return helper.make_node(op, inputs.split(), [output], domain=domain, **attributes)


def _model(
    *nodes: onnx.NodeProto,
    functions: tuple[onnx.FunctionProto, ...] = (),
    **constants: object,
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    graph = helper.make_graph(nodes, "g", [X], [Y], tensors)
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=8, functions=functions)


def _body(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(nodes, "b", [], [helper.make_tensor_value_info("z", 1, None)])


def _function(name: str, *nodes: onnx.NodeProto) -> onnx.FunctionProto:
    return helper.make_function("my", name, ["x", "m"], ["y"], nodes, OPSETS, ["flag"])


def models() -> tuple[onnx.ModelProto, ...]:
    """Valid models that together contain every kind of message."""
    half, on, off = np.float32(0.5), np.asarray(True), np.asarray(False)
    batch = {name: np.ones(4, np.float32) for name in "sbmv"}
    large = np.arange(600, dtype=np.int64)
    drop = _node("Dropout", "x r m")
    flagged = _node("BatchNormalization", "x m m m m")
    flagged.attribute.add(name="training_mode", ref_attr_name="flag", type=2)
    branches = {
        "then_branch": _body(_node("Relu", "x", "z")),
        "else_branch": _body(_node("Neg", "x", "z")),
    }
    sparse = _model(_node("Add", "x w"))
    values = numpy_helper.from_array(np.ones(1, np.float32), "w")
    positions = numpy_helper.from_array(np.zeros(1, np.int64), "i")
    sparse.graph.sparse_initializer.append(helper.make_sparse_tensor(values, positions, [4]))
    external = _model(_node("Add", "x w"), w=np.ones(4, np.float32))
    external.graph.initializer[0].ClearField("raw_data")
    external.graph.initializer[0].data_location = TensorProto.EXTERNAL
    external.graph.initializer[0].external_data.add(key="location", value="weights.bin")
    text = helper.make_node("Constant", [], ["t"], value_string="some")
    statistics = (
        _node("ReduceMean", "x", "m", axes=[0], keepdims=0),
        _node("Sub", "x m", "d"),
        _node("Mul", "d d", "q"),
        _node("ReduceMean", "q", "v", axes=[0], keepdims=0),
    )
    transposed = (
        _node("Transpose", "x", "t", perm=[1, 0]),
        _node("ReduceMean", "t", "m", axes=[1], keepdims=1),
        _node("Sub", "t m", "d"),
        _node("Mul", "d d", "q"),
        _node("ReduceMean", "q", "v", axes=[1], keepdims=1),
        _node("Sqrt", "v", "s"),
        _node("Div", "d s", "z"),
        _node("Transpose", "z", perm=[1, 0]),
    )
    by_rows = _model(*transposed)
    by_rows.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    ones = np.ones(4, np.float32)
    return (
        _model(_node("Relu", "x")),
        _model(drop, r=half, m=on),
        _model(drop, r=half, m=off),
        _model(_node("Not", "o", "m"), drop, r=half, o=on),
        _model(_node("Constant", "", "m", value=numpy_helper.from_array(off)), drop, r=half),
        _model(
            _node("Gather", "a i", "g"), _node("Cast", "g", "m", to=9), drop, r=half, a=large, i=3
        ),
        _model(
            _node("Shape", "a", "g"),
            _node("ReduceMax", "g", "h", keepdims=0),
            _node("Cast", "h", "m", to=9),
            drop,
            r=half,
            a=large,
        ),
        _model(
            _node("Slice", "a i j", "g"),
            _node("ReduceSum", "g", "h", keepdims=0),
            _node("Cast", "h", "m", to=9),
            drop,
            r=half,
            a=large,
            i=np.array([1]),
            j=np.array([5]),
        ),
        _model(
            _node("Expand", "a i", "g"),
            _node("ReduceMin", "g", "h", keepdims=0),
            _node("Cast", "h", "m", to=9),
            drop,
            r=half,
            a=1,
            i=np.array([5, 5]),
        ),
        _model(_node("BatchNormalization", "x s b m v", training_mode=0), **batch),
        _model(_node("If", "c", **branches), c=on),
        _model(_node("If", "c", "z", **branches), _node("Relu", "z"), c=off),
        _model(_node("f", "x m"), functions=(_function("f", _node("Dropout", "x m m")),), m=off),
        _model(
            _node("g", "x m", flag=0),
            functions=(_function("g", flagged),),
            m=np.ones(4, np.float32),
        ),
        _model(
            _node("f", "x m"),
            functions=(_function("f", _node("g", "x m")), _function("g", _node("Relu", "x"))),
            m=off,
        ),
        _model(_node("RandomNormalLike", "x", "n", scale=0.1), _node("Add", "x n")),
        _model(text, _node("Relu", "x")),
        _model(_node("MatMul", "x w"), w=np.ones((4, 4), np.float16)),
        _model(_node("Add", "x w"), w=np.ones(4, np.float64)),
        _model(*statistics, _node("BatchNormalization", "x s b m v"), s=ones, b=ones),
        by_rows,
        sparse,
        external,
    )


def damaged(model: onnx.ModelProto, chance: random.Random) -> bytes:
    """The model with one to four random changes, in its fields or in its bytes."""
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    if chance.random() < 0.7:
        for _ in range(chance.randrange(1, 5)):
            _change_field(broken, chance)
        return bytes(broken.SerializeToString())
    data = bytearray(broken.SerializeToString())
    for _ in range(chance.randrange(1, 5)):
        start = chance.randrange(len(data) + 1)
        piece = bytes(chance.randrange(256) for _ in range(chance.randrange(3)))
        data[start : start + chance.randrange(4)] = piece
        if not data:
            break
    return bytes(data)


def _change_field(model: onnx.ModelProto, chance: random.Random) -> None:
    message = chance.choice(list(_nested_messages(model)))
    fields = [item for item, _ in message.ListFields()]
    if chance.random() < 0.3:
        fields = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = chance.choice(fields)
    kind = chance.choice(["drop", "set", "set", "set", "repeat"])
    if kind == "drop":
        message.ClearField(field.name)
    elif field.is_repeated:
        items: Any = getattr(message, field.name)
        if kind == "repeat" and items:
            count = chance.choice([1, 2, 50])
            items.extend([chance.choice(list(items)) for _ in range(count)])
        elif field.message_type is not None:
            items.add()
        elif items and chance.random() < 0.7:
            items[chance.randrange(len(items))] = _random_value(field, chance)
        else:
            items.append(_random_value(field, chance))
    elif field.message_type is not None:
        getattr(message, field.name).SetInParent()
        messages = [
            item for item in _nested_messages(model) if item.DESCRIPTOR is field.message_type
        ]
        if messages:
            copy = type(messages[0])()
            copy.CopyFrom(chance.choice(messages))
            getattr(message, field.name).CopyFrom(copy)
    else:
        setattr(message, field.name, _random_value(field, chance))


def _random_value(field: FieldDescriptor, chance: random.Random) -> object:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return bytes(chance.randrange(256) for _ in range(chance.choice([0, 1, 4, 8, 2000])))
        case FieldDescriptor.CPPTYPE_STRING:
            return chance.choice(TEXTS)
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return chance.choice([0.0, -1.0, 1e30, float("nan"), float("inf")])
        case FieldDescriptor.CPPTYPE_ENUM:
            return chance.choice(field.enum_type.values).number
        case FieldDescriptor.CPPTYPE_INT32:
            return chance.choice(NUMBERS[:9])
        case FieldDescriptor.CPPTYPE_UINT64:
            return abs(chance.choice(NUMBERS))
        case _:
            return chance.choice(NUMBERS)


def _nested_messages(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in value if field.is_repeated else [value]:
                yield from _nested_messages(item)
