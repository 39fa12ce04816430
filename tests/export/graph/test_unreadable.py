"""What holds no model, or a broken one, is one sentence that names the file and the place; never
more than that.
"""

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


def refused(model: onnx.ModelProto | bytes, name: str = "some.onnx") -> str:
    """The sentence after the file's name; the same whether the model is read or was made in
    memory.
    """
    data = model if isinstance(model, bytes) else model.SerializeToString()
    with pytest.raises(ModelUnreadable) as caught:
        read_graph(data, name=name)
    if not isinstance(model, bytes):
        with pytest.raises(ModelUnreadable) as again:
            graph_of(model, name=name)
        assert str(again.value) == str(caught.value)
    said = str(caught.value)
    assert said.startswith(name)
    assert "\n" not in said
    return said.removeprefix(name)


WHOLE = model_of(
    node("Relu", "x", "h"),
    node("Add", "h w", "y", name="add"),
    initializers=(numpy_helper.from_array(np.ones(2, np.float32), "w"),),
)
EVERYWHERE = model_of(
    node("f", "x", "y"), functions=(function("f", node("Relu", "x", "y", name="n")),)
)
W = numpy_helper.from_array(np.ones(2, np.float32), "w")


@pytest.mark.parametrize(
    ("model", "said"),
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
            model_of(node("Relu", "x", "w"), node("Relu", "w", "y"), initializers=(W,)),
            "the name 'w' has two meanings",
        ),
        (
            model_of(node("Relu", "x", "y"), initializers=(W, W)),
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
def test_a_graph_whose_names_do_not_add_up_is_refused_with_the_place(
    model: onnx.ModelProto, said: str
) -> None:
    assert refused(model).startswith(f" is not a valid ONNX model: {said}")


def test_an_attribute_that_stands_twice_is_refused() -> None:
    twice = node("Dropout", "x", "y", name="n", is_test=1)
    twice.attribute.append(helper.make_attribute("is_test", 0))
    assert (
        refused(model_of(twice))
        == " is not a valid ONNX model: the node 'n' has an attribute twice"
    )


def test_a_name_that_is_no_text_is_refused() -> None:
    for data in (WHOLE.SerializeToString(), EVERYWHERE.SerializeToString()):
        for name in (b"\x01h", b"\x01x", b"\x01w", b"\x01y", b"\x04Relu", b"\x02my"):
            changed = data.replace(name, name[:-1] + b"\xff")
            assert outcome(changed).endswith("is not UTF-8") or changed == data


def test_a_name_that_a_body_reads_from_outside_and_then_defines_is_refused() -> None:
    inner = helper.make_graph(
        [node("Not", "m", "n"), node("Not", "n", "m"), node("Relu", "x", "z")], "b", [], [Y]
    )
    inner.output[0].name = "z"
    mode = numpy_helper.from_array(np.asarray(True), "m")
    choice = node("If", "m", "y", name="if", then_branch=inner, else_branch=inner)
    said = refused(model_of(choice, initializers=(mode,)))
    assert said.endswith("_branch before it gets a second meaning there")


@pytest.mark.parametrize(
    ("functions", "said"),
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
def test_a_function_that_cannot_be_entered_is_refused(
    functions: tuple[onnx.FunctionProto, ...], said: str
) -> None:
    assert (
        refused(model_of(node("f", "x", "y"), functions=functions))
        == f" is not a valid ONNX model: {said}"
    )


def test_a_function_that_calls_itself_in_a_branch_is_refused() -> None:
    again = helper.make_graph(
        [node("f", "x", "z")], "b", [], [helper.make_tensor_value_info("z", 1, [2])]
    )
    inner = function("f", node("If", "x", "y", then_branch=again, else_branch=again))
    assert refused(model_of(node("f", "x", "y"), functions=(inner,))).endswith(
        "the function my:f calls itself"
    )


def test_functions_that_call_one_another_into_the_billions_are_refused_at_once() -> None:
    doubled = [
        function(f"f{n}", node(f"f{n + 1}", "x", "h"), node(f"f{n + 1}", "h", "y"))
        for n in range(40)
    ]
    started = time.perf_counter()
    said = refused(
        model_of(
            node("f0", "x", "y"), functions=(*doubled, function("f40", node("Relu", "x", "y")))
        )
    )
    assert said.endswith("its functions call one another until there are more than 100,000 nodes")
    assert time.perf_counter() - started < 5


def test_a_thousand_functions_inside_one_another_are_refused() -> None:
    chain = [function(f"f{n}", node(f"f{n + 1}", "x", "y")) for n in range(1000)]
    said = refused(
        model_of(
            node("f0", "x", "y"), functions=(*chain, function("f1000", node("Relu", "x", "y")))
        )
    )
    assert "more than 100 deep" in said


@pytest.mark.parametrize(
    ("weight", "said"),
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
def test_a_tensor_whose_values_cannot_be_its_own_is_refused(
    weight: onnx.TensorProto, said: str
) -> None:
    model = model_of(node("Relu", "x", "y"), initializers=(weight,))
    assert refused(model).startswith(f" is not a valid ONNX model: {said}")


@pytest.mark.parametrize("opset", [-1, 0, 2**40])
def test_an_opset_that_there_cannot_be_is_refused(opset: int) -> None:
    model = model_of(node("Relu", "x", "y"))
    model.opset_import[0].version = opset
    assert refused(model) == f" is not an ONNX model: opset {opset} of domain ''"
    inside = model_of(node("f", "x", "y"), functions=(function("f", node("Relu", "x", "y")),))
    inside.functions[0].opset_import[0].version = opset
    assert refused(inside) == f" is not an ONNX model: opset {opset} of domain ''"


def test_what_has_no_graph_is_refused() -> None:
    assert refused(onnx.ModelProto(opset_import=OPSETS)) == " is not an ONNX model: it has no graph"
    assert refused(onnx.ModelProto()) == " is not an ONNX model: it has no graph"


def test_what_names_no_opset_is_refused_for_that() -> None:
    model = model_of(node("Relu", "x", "y"))
    del model.opset_import[:]
    assert refused(model) == " is not an ONNX model: it names no opset"


def test_an_opset_that_is_newer_than_any_known_one_is_no_damage() -> None:
    model = model_of(node("Relu", "x", "y"))
    model.opset_import[0].version = 314159
    assert outcome(model.SerializeToString()) == "read"


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_a_model_of_before_the_opsets_has_the_first_one(version: int) -> None:
    model = model_of(node("Relu", "x", "y"))
    del model.opset_import[:]
    model.ir_version = version
    if version in (1, 2):
        assert [at.opset for at in graph_of(model).nodes] == [1]
        assert not model.opset_import, "the caller's model is as it was"
    else:
        assert refused(model) == " is not an ONNX model: it names no opset"


@pytest.mark.parametrize(("opsets"), [(0, 7), (7, 0), (-1, 7)])
def test_an_opset_of_0_beside_another_one_leaves_it_open_which_holds(
    opsets: tuple[int, int],
) -> None:
    model = model_of(node("Dropout", "x", "y"))
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid("", opset) for opset in opsets)
    assert [at.opset for at in graph_of(model).nodes] == [0]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"


def test_a_git_lfs_pointer_is_told_as_one_with_how_to_fetch_the_model(tmp_path: Path) -> None:
    path = tmp_path / "some.onnx"
    path.write_bytes(POINTER)
    with pytest.raises(ModelUnreadable) as caught:
        open_graph(path)
    said = " is a Git LFS pointer and not the model: fetch it with `git lfs pull`"
    assert str(caught.value) == f"{path}{said}"
    assert refused(POINTER) == said


def padded() -> bytes:
    """A model with a weight that is large enough to stay in the file."""
    large = numpy_helper.from_array(np.ones(5000, np.float32), "w")
    return model_of(node("Relu", "x", "y"), initializers=(large,)).SerializeToString()


def test_a_model_that_breaks_off_anywhere_is_refused_or_whole() -> None:
    data = padded()
    found = [outcome(data[:end]) for end in [*range(1, 200), *range(len(data) - 200, len(data))]]
    assert found.count("read") < 20, "what breaks off between two fields may be whole"


def test_a_model_with_any_bytes_changed_is_read_or_refused() -> None:
    draw, data, found = random.Random(0), WHOLE.SerializeToString(), []
    for _ in range(3000):
        changed = bytearray(data)
        for _ in range(draw.randrange(1, 4)):
            changed[draw.randrange(len(data))] = draw.randrange(256)
        found.append(outcome(bytes(changed)))
    assert 300 < found.count("read") < 2500, "both ends were met"


def outcome(data: bytes) -> str:
    """Either "read", or the sentence of the refusal; anything else than these two is for the test
    to fail on.
    """
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
def test_bytes_that_are_no_protobuf_are_refused(data: bytes) -> None:
    assert refused(data).startswith(" is not an ONNX model: ")


def test_a_message_that_is_nested_without_end_is_refused() -> None:
    data = b"x" * 2000
    for _ in range(400):  # an attribute's graph's node's attribute's graph's ...
        for field in (0x32, 0x2A, 0x0A):
            size, head = len(data), bytearray([field])
            while size > 127:
                head.append(size & 127 | 128)
                size >>= 7
            data = bytes([*head, size]) + data
    assert "nests more than 100 messages deep" in refused(
        b"\x3a" + bytes([len(data) & 127 | 128, len(data) >> 7]) + data
    )


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    empty, pipe = tmp_path / "empty.onnx", tmp_path / "pipe.onnx"
    empty.touch()
    os.mkfifo(pipe)
    said = {
        empty: "is not an ONNX model: it is empty",
        pipe: "cannot be read: it is no regular file",
        tmp_path: "cannot be read: it is no regular file",
        tmp_path / "absent.onnx": "cannot be read: No such file or directory",
    }
    for path, sentence in said.items():
        with pytest.raises(ModelUnreadable) as caught:
            open_graph(path)
        assert str(caught.value) == f"{path} {sentence}"


EXTERNAL = {
    "location": "weights.bin",
    "offset": "0",
    "length": "8",
}


def beside(folder: Path, **entries: str) -> Path:
    """A model whose weight is in a file beside it."""
    outside = tensor(data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (EXTERNAL | entries).items():
        outside.external_data.add(key=key, value=value)
    path = folder / "some.onnx"
    path.write_bytes(model_of(node("Add", "x w", "y"), initializers=(outside,)).SerializeToString())
    return path


@pytest.mark.parametrize(
    ("entries", "said"),
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
def test_values_in_a_file_that_cannot_hold_them_are_refused(
    entries: dict[str, str], said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (folder, tmp_path):
        (place / "weights.bin").write_bytes(bytes(8))
    (folder / "folder").mkdir()
    (folder / "out.bin").symlink_to(tmp_path / "weights.bin")
    (folder / "around").symlink_to(folder / "around")
    with pytest.raises(ModelUnreadable) as caught:
        open_graph(beside(folder, **entries))
    assert str(caught.value).startswith(
        f"{folder / 'some.onnx'} is not a valid ONNX model: the tensor 'w' "
    )
    assert said in str(caught.value)


def test_a_git_lfs_pointer_in_place_of_the_weights_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(POINTER)
    with pytest.raises(
        ModelUnreadable, match=r"weights\.bin, which is a Git LFS pointer .*`git lfs pull`"
    ):
        open_graph(beside(tmp_path, length="", offset="4096"))


def test_values_in_a_file_beside_the_model_are_found(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(np.asarray([1, 2], np.float32).tobytes())
    (weight,) = open_graph(beside(tmp_path)).weights
    assert weight.array().tolist() == [1, 2]
    (weight,) = open_graph(beside(tmp_path, offset="", length="")).weights
    assert weight.array().tolist() == [1, 2]
