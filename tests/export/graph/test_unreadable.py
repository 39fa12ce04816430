"""A file without a valid model is refused in one sentence that names the file and the fault."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evalmode.export.graph import ModelUnreadable, graph_of, open_graph, read_graph

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
OPSETS = [helper.make_opsetid("", 20), helper.make_opsetid("my", 1)]


def node(op: str, inputs: str, outputs: str, **attributes: object) -> onnx.NodeProto:
    domain = "my" if op.islower() else ""
    return helper.make_node(op, inputs.split(), outputs.split(), domain=domain, **attributes)


def model_of(
    *nodes: onnx.NodeProto,
    initializers: tuple[onnx.TensorProto, ...] = (),
    functions: tuple[onnx.FunctionProto, ...] = (),
    inputs: tuple[onnx.ValueInfoProto, ...] = (X,),
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "main", inputs, [Y], initializers)
    return helper.make_model(graph, opset_imports=OPSETS, functions=functions)


def function(name: str, *nodes: onnx.NodeProto, inputs: str = "x") -> onnx.FunctionProto:
    return helper.make_function("my", name, inputs.split(), ["y"], nodes, OPSETS)


def tensor(name: str = "w", **fields: object) -> onnx.TensorProto:
    return TensorProto(name=name, **fields)  # type: ignore[arg-type]


def refusal_of(model: onnx.ModelProto | bytes, name: str = "some.onnx") -> str:
    """The message of the refusal after the file's name.

    A model object must be refused with the same message as its bytes.
    """
    data = model if isinstance(model, bytes) else model.SerializeToString()
    with pytest.raises(ModelUnreadable) as caught:
        read_graph(data, name=name)
    if not isinstance(model, bytes):
        with pytest.raises(ModelUnreadable) as in_memory:
            graph_of(model, name=name)
        assert str(in_memory.value) == str(caught.value)
    message = str(caught.value)
    assert message.startswith(name)
    assert "\n" not in message
    return message.removeprefix(name)


VALID_MODEL = model_of(
    node("Relu", "x", "h"),
    node("Add", "h w", "y", name="add"),
    initializers=(numpy_helper.from_array(np.ones(2, np.float32), "w"),),
)
MODEL_WITH_FUNCTION = model_of(
    node("f", "x", "y"), functions=(function("f", node("Relu", "x", "y", name="n")),)
)
WEIGHT = numpy_helper.from_array(np.ones(2, np.float32), "w")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            model_of(node("Relu", "z", "y", name="n")),
            "the input 'z' of the node 'n' is defined by nothing",
        ),
        (
            model_of(node("Relu", "x", "z")),
            "the output 'y' of the main graph is defined by nothing",
        ),
        (
            model_of(
                node("Add", "x b", "a", name="n"), node("Relu", "a", "b"), node("Relu", "a", "y")
            ),
            (
                "the input 'b' of the node 'n' is defined only later: the nodes are not sorted, or"
                " form a cycle"
            ),
        ),
        (
            model_of(node("Add", "x y", "y", name="n")),
            (
                "the input 'y' of the node 'n' is defined only later: the nodes are not sorted, or"
                " form a cycle"
            ),
        ),
        (
            model_of(node("Relu", "x", "y"), node("Tanh", "x", "y")),
            "the name 'y' has two meanings in the main graph",
        ),
        (
            model_of(node("Relu", "x", "x"), node("Relu", "x", "y")),
            "the name 'x' has two meanings in the main graph",
        ),
        (
            model_of(node("Relu", "x", "w"), node("Relu", "w", "y"), initializers=(WEIGHT,)),
            "the name 'w' has two meanings",
        ),
        (
            model_of(node("Relu", "x", "y"), initializers=(WEIGHT, WEIGHT)),
            "the name 'w' has two meanings in the main graph",
        ),
        (
            model_of(node("Relu", "x", "y"), inputs=(X, X)),
            "the name 'x' has two meanings in the main graph",
        ),
        (model_of(node("Split", "x", "y y")), "the name 'y' has two meanings in the main graph"),
        (model_of(onnx.NodeProto(name="n", output=["y"])), "the node 'n' has no operator"),
    ],
    ids=lambda item: item[:40] if isinstance(item, str) else "",
)
def test_an_undefined_or_ambiguous_name_is_refused_with_its_node(
    model: onnx.ModelProto, message: str
) -> None:
    assert refusal_of(model).startswith(f" is not a valid ONNX model: {message}")


def test_a_duplicate_attribute_is_refused() -> None:
    twice = node("Dropout", "x", "y", name="n", is_test=1)
    twice.attribute.append(helper.make_attribute("is_test", 0))
    assert (
        refusal_of(model_of(twice))
        == " is not a valid ONNX model: the node 'n' has an attribute twice"
    )


def test_a_name_that_is_not_utf_8_is_refused() -> None:
    for data in (VALID_MODEL.SerializeToString(), MODEL_WITH_FUNCTION.SerializeToString()):
        for name in (b"\x01h", b"\x01x", b"\x01w", b"\x01y", b"\x04Relu", b"\x02my"):
            changed = data.replace(name, name[:-1] + b"\xff")
            assert read_or_refusal(changed).endswith("is not UTF-8") or changed == data


def test_a_body_may_not_define_an_outer_name_that_it_has_read() -> None:
    inner = helper.make_graph(
        [node("Not", "m", "n"), node("Not", "n", "m"), node("Relu", "x", "z")], "b", [], [Y]
    )
    inner.output[0].name = "z"
    mode = numpy_helper.from_array(np.asarray(True), "m")
    choice = node("If", "m", "y", name="if", then_branch=inner, else_branch=inner)
    message = refusal_of(model_of(choice, initializers=(mode,)))
    assert message.endswith("_branch before it gets a second meaning there")


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ((function("f", node("f", "x", "y")),), "the function my:f calls itself"),
        (
            (function("f", node("g", "x", "y")), function("g", node("f", "x", "y"))),
            "the function my:f calls itself",
        ),
        ((function("f", node("Relu", "x", "y")),) * 2, "it defines a function twice"),
        (
            (function("f", node("Relu", "x", "y"), inputs="x x"),),
            "the function my:f names an input twice",
        ),
        (
            (function("f", node("Relu", "x", "z")),),
            "the output 'y' of f_0/my:f is defined by nothing",
        ),
        (
            (function("f", node("Relu", "x", "y"), inputs=""),),
            "the node 'f_0' has 1 inputs, its function takes 0",
        ),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_an_invalid_or_recursive_function_is_refused(
    functions: tuple[onnx.FunctionProto, ...], message: str
) -> None:
    assert (
        refusal_of(model_of(node("f", "x", "y"), functions=functions))
        == f" is not a valid ONNX model: {message}"
    )


def test_a_function_that_calls_itself_in_a_branch_is_refused() -> None:
    recursive_call = helper.make_graph(
        [node("f", "x", "z")], "b", [], [helper.make_tensor_value_info("z", 1, [2])]
    )
    inner = function(
        "f", node("If", "x", "y", then_branch=recursive_call, else_branch=recursive_call)
    )
    assert refusal_of(model_of(node("f", "x", "y"), functions=(inner,))).endswith(
        "the function my:f calls itself"
    )


def test_functions_that_expand_to_billions_of_nodes_are_refused_in_seconds() -> None:
    doubled = [
        function(f"f{depth}", node(f"f{depth + 1}", "x", "h"), node(f"f{depth + 1}", "h", "y"))
        for depth in range(40)
    ]
    started = time.perf_counter()
    message = refusal_of(
        model_of(
            node("f0", "x", "y"), functions=(*doubled, function("f40", node("Relu", "x", "y")))
        )
    )
    assert message.endswith(
        "its functions call one another: all calls together have more than 100,000 nodes"
    )
    assert time.perf_counter() - started < 5


def test_a_thousand_nested_functions_are_refused() -> None:
    chain = [function(f"f{depth}", node(f"f{depth + 1}", "x", "y")) for depth in range(1000)]
    message = refusal_of(
        model_of(
            node("f0", "x", "y"), functions=(*chain, function("f1000", node("Relu", "x", "y")))
        )
    )
    assert "more than 100 deep" in message


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            tensor(data_type=1, dims=[4], raw_data=b"abc"),
            "the tensor 'w' has 3 bytes, its shape [4] needs 16",
        ),
        (
            tensor(data_type=1, dims=[2**40, 2**40]),
            f"the tensor 'w' has 0 bytes, its shape [{2**40}, {2**40}] needs",
        ),
        (tensor(data_type=1, dims=[-1], raw_data=b"abcd"), "the tensor 'w' has shape [-1]"),
        (
            tensor(data_type=999, dims=[1], raw_data=b"a"),
            "the tensor 'w' has element type 999, which does not exist",
        ),
        (
            tensor(dims=[1], raw_data=b"a"),
            "the tensor 'w' has element type 0, which does not exist",
        ),
        (
            tensor(data_type=1, dims=[9], raw_data=bytes(5000)),
            "the tensor 'w' has 5000 bytes, its shape [9] needs 36",
        ),
    ],
    ids=[
        "too short",
        "huge",
        "negative",
        "unknown type",
        "no type",
        "too long, and left in the file",
    ],
)
def test_a_tensor_whose_bytes_contradict_its_type_or_shape_is_refused(
    weight: onnx.TensorProto, message: str
) -> None:
    model = model_of(node("Relu", "x", "y"), initializers=(weight,))
    assert refusal_of(model).startswith(f" is not a valid ONNX model: {message}")


@pytest.mark.parametrize("opset", [-1, 0, 2**40])
def test_an_impossible_opset_is_refused(opset: int) -> None:
    model = model_of(node("Relu", "x", "y"))
    model.opset_import[0].version = opset
    assert refusal_of(model) == f" is not an ONNX model: opset {opset} of domain ''"
    inside = model_of(node("f", "x", "y"), functions=(function("f", node("Relu", "x", "y")),))
    inside.functions[0].opset_import[0].version = opset
    assert refusal_of(inside) == f" is not an ONNX model: opset {opset} of domain ''"


def test_a_model_without_a_graph_is_refused() -> None:
    assert (
        refusal_of(onnx.ModelProto(opset_import=OPSETS)) == " is not an ONNX model: it has no graph"
    )
    assert refusal_of(onnx.ModelProto()) == " is not an ONNX model: it has no graph"


def test_a_model_without_an_opset_is_refused() -> None:
    model = model_of(node("Relu", "x", "y"))
    del model.opset_import[:]
    assert refusal_of(model) == " is not an ONNX model: it names no opset"


def test_an_opset_of_the_future_is_readable() -> None:
    model = model_of(node("Relu", "x", "y"))
    model.opset_import[0].version = 314159
    assert read_or_refusal(model.SerializeToString()) == "read"


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_a_model_in_ir_version_1_or_2_has_opset_1(version: int) -> None:
    model = model_of(node("Relu", "x", "y"))
    del model.opset_import[:]
    model.ir_version = version
    if version in (1, 2):
        assert [at.opset for at in graph_of(model).nodes] == [1]
        assert not model.opset_import, "the caller's model is unchanged"
    else:
        assert refusal_of(model) == " is not an ONNX model: it names no opset"


@pytest.mark.parametrize(("opsets"), [(0, 7), (7, 0), (-1, 7)])
def test_two_contradictory_opsets_are_read_as_an_unknown_opset(
    opsets: tuple[int, int],
) -> None:
    model = model_of(node("Dropout", "x", "y"))
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid("", opset) for opset in opsets)
    assert [at.opset for at in graph_of(model).nodes] == [0]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"


def test_a_git_lfs_pointer_is_named_with_the_command_that_fetches_the_model(tmp_path: Path) -> None:
    path = tmp_path / "some.onnx"
    path.write_bytes(POINTER)
    with pytest.raises(ModelUnreadable) as caught:
        open_graph(path)
    message = " is a Git LFS pointer and not the model: fetch it with `git lfs pull`"
    assert str(caught.value) == f"{path}{message}"
    assert refusal_of(POINTER) == message


def model_with_large_weight() -> bytes:
    """A model with a weight that is large enough to stay in the file."""
    large = numpy_helper.from_array(np.ones(5000, np.float32), "w")
    return model_of(node("Relu", "x", "y"), initializers=(large,)).SerializeToString()


def test_a_truncated_model_is_refused_or_readable() -> None:
    data = model_with_large_weight()
    outcomes = [
        read_or_refusal(data[:end]) for end in [*range(1, 200), *range(len(data) - 200, len(data))]
    ]
    assert outcomes.count("read") < 20, "a model cut between two fields may be valid"


def test_a_model_with_any_bytes_changed_is_read_or_refused() -> None:
    draw, data, outcomes = random.Random(0), VALID_MODEL.SerializeToString(), []
    for _ in range(3000):
        changed = bytearray(data)
        for _ in range(draw.randrange(1, 4)):
            changed[draw.randrange(len(data))] = draw.randrange(256)
        outcomes.append(read_or_refusal(bytes(changed)))
    assert 300 < outcomes.count("read") < 2500, "some models are readable and some are refused"


def read_or_refusal(data: bytes) -> str:
    """ "read", or the message of the refusal. Any other exception fails the test."""
    try:
        read_graph(data, name="some.onnx")
    except ModelUnreadable as error:
        return str(error)
    return "read"


@pytest.mark.parametrize(
    "data",
    [b"text", bytes(3000), b"\x0b\x0c", b"\xff" * 50, b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x05ab"],
    ids=["text", "zeros", "groups", "ones", "a length past the end", "broken off"],
)
def test_bytes_that_are_not_a_protobuf_are_refused(data: bytes) -> None:
    assert refusal_of(data).startswith(" is not an ONNX model: ")


def test_a_deeply_nested_message_is_refused() -> None:
    data = b"x" * 2000
    # Each round wraps the data in an attribute, a node and a graph.
    for _ in range(400):
        for field in (0x32, 0x2A, 0x0A):
            size, head = len(data), bytearray([field])
            while size > 127:
                head.append(size & 127 | 128)
                size >>= 7
            data = bytes([*head, size]) + data
    assert "nests more than 100 messages deep" in refusal_of(
        b"\x3a" + bytes([len(data) & 127 | 128, len(data) >> 7]) + data
    )


def test_a_path_that_is_not_a_readable_file_is_refused(tmp_path: Path) -> None:
    empty, pipe = tmp_path / "empty.onnx", tmp_path / "pipe.onnx"
    empty.touch()
    os.mkfifo(pipe)
    expected = {
        empty: "is not an ONNX model: it is empty",
        pipe: "cannot be read: it is not a regular file",
        tmp_path: "cannot be read: it is not a regular file",
        tmp_path / "absent.onnx": "cannot be read: No such file or directory",
    }
    for path, message in expected.items():
        with pytest.raises(ModelUnreadable) as caught:
            open_graph(path)
        assert str(caught.value) == f"{path} {message}"


EXTERNAL = {
    "location": "weights.bin",
    "offset": "0",
    "length": "8",
}


def save_with_external_weight(folder: Path, **entries: str) -> Path:
    """Save a model whose weight is in `weights.bin`; the entries override its external data."""
    weight = tensor(data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (EXTERNAL | entries).items():
        weight.external_data.add(key=key, value=value)
    path = folder / "some.onnx"
    path.write_bytes(model_of(node("Add", "x w", "y"), initializers=(weight,)).SerializeToString())
    return path


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"location": "absent.bin"},
            "the tensor 'w' is in the file 'absent.bin', which does not exist",
        ),
        ({"location": "../weights.bin"}, "which is not a path below the model's folder"),
        ({"location": "/etc/hostname"}, "which is not a path below the model's folder"),
        ({"location": ""}, "which is not a path below the model's folder"),
        ({"location": "a\0b"}, "which is not a path below the model's folder"),
        ({"location": "out.bin"}, "which leads out of the model's folder"),
        ({"location": "around/and/around"}, "which cannot be read"),
        ({"location": "folder"}, "which is not a regular file"),
        ({"offset": "4"}, "the tensor 'w' needs bytes 4 to 12 of"),
        ({"offset": "-1"}, "the tensor 'w' needs bytes -1 to 7 of"),
        ({"length": "9"}, "the tensor 'w' needs bytes 0 to 9 of"),
        ({"length": "4"}, "the tensor 'w' has 4 bytes, its shape [2] needs 8"),
        ({"length": "-2"}, "the tensor 'w' needs bytes 0 to -2 of"),
        ({"offset": "zero"}, "the tensor 'w' has an offset or a length that is no number"),
        ({"location": "x" * 5000}, "which cannot be read"),
    ],
    ids=lambda item: "=".join(next(iter(item.items())))[:20] if isinstance(item, dict) else "",
)
def test_an_unusable_external_file_is_refused(
    entries: dict[str, str], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for parent in (folder, tmp_path):
        (parent / "weights.bin").write_bytes(bytes(8))
    (folder / "folder").mkdir()
    (folder / "out.bin").symlink_to(tmp_path / "weights.bin")
    (folder / "around").symlink_to(folder / "around")
    with pytest.raises(ModelUnreadable) as caught:
        open_graph(save_with_external_weight(folder, **entries))
    assert str(caught.value).startswith(
        f"{folder / 'some.onnx'} is not a valid ONNX model: the tensor 'w' "
    )
    assert message in str(caught.value)


def test_a_git_lfs_pointer_in_place_of_the_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(POINTER)
    with pytest.raises(
        ModelUnreadable, match=r"weights\.bin, which is a Git LFS pointer .*`git lfs pull`"
    ):
        open_graph(save_with_external_weight(tmp_path, length="", offset="4096"))


def test_the_values_in_an_external_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(np.asarray([1, 2], np.float32).tobytes())
    (weight,) = open_graph(save_with_external_weight(tmp_path)).weights
    assert weight.array().tolist() == [1, 2]
    (weight,) = open_graph(save_with_external_weight(tmp_path, offset="", length="")).weights
    assert weight.array().tolist() == [1, 2]
