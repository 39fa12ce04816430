"""A model that draws or trains is refused in whatever way it is written; any other is accepted.

The models are built with onnx, and ONNX Runtime shows that those which are refused would draw.
"""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
    numpy_helper,
)

from evalmode.bundle.errors import BundleNotCertified
from evalmode.bundle.operators import check_operators

SIZE = 64
X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [SIZE])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [SIZE])
RATE = numpy_helper.from_array(np.float32(0.5), "rate")
ON, OFF = (numpy_helper.from_array(np.array(mode), "mode") for mode in (True, False))
YES = numpy_helper.from_array(np.array(True), "yes")
DOMAINS = ("my", "com.microsoft", "com.ms.internal.nhwc", "ai.onnx.preview.training")
node = helper.make_node


def drop(*, output: str = "y") -> NodeProto:
    return node("Dropout", ["x", "rate", "mode"], [output], name="drop")


def draw(*, output: str = "y") -> NodeProto:
    return node("RandomUniformLike", ["x"], [output], name="draw")


def quiet(*, output: str = "y") -> NodeProto:
    return node("Relu", ["x"], [output], name="quiet")


def constant(value: object, output: str = "mode") -> NodeProto:
    return node("Constant", [], [output], value=numpy_helper.from_array(np.asarray(value)))


def model_of(
    *nodes: NodeProto,
    weights: tuple[TensorProto, ...] = (RATE,),
    functions: tuple[onnx.FunctionProto, ...] = (),
    inputs: tuple[onnx.ValueInfoProto, ...] = (X,),
    opset: int = 17,
) -> ModelProto:
    graph = helper.make_graph(nodes, "main", inputs, [Y], weights)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in DOMAINS)]
    return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)


def body(*nodes: NodeProto, weights: tuple[TensorProto, ...] = (), name: str = "t") -> GraphProto:
    value = helper.make_tensor_value_info(name, TensorProto.FLOAT, [SIZE])
    return helper.make_graph(nodes, "body", [], [value], weights)


def chosen(branch: GraphProto) -> NodeProto:
    """An If one of whose branches is `branch`, with the output `t`."""
    else_branch = body(quiet(output="e"), name="e")
    return node("If", ["yes"], ["y"], name="choose", then_branch=branch, else_branch=else_branch)


def function(
    *nodes: NodeProto, name: str = "block", domain: str = "my", attributes: tuple[str, ...] = ()
) -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    return helper.make_function(domain, name, ["x"], ["y"], nodes, imports, attributes)


def repeated(output_node: NodeProto) -> NodeProto:
    """A Loop of one turn, whose body has the output `t`."""
    truth = helper.make_tensor_value_info("again", TensorProto.BOOL, [])
    loop = body(output_node, node("Identity", ["go"], ["again"]))
    loop.input.extend(
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        ]
    )
    outputs = [truth, *loop.output]
    del loop.output[:]
    loop.output.extend(outputs)
    return node("Loop", ["one", "yes"], ["rows"], name="repeat", body=loop)


def refusal(model: ModelProto | bytes) -> str:
    """Why a model is refused; empty for one that is accepted."""
    data = model if isinstance(model, bytes) else model.SerializeToString()
    try:
        check_operators(data)
    except BundleNotCertified as error:
        return str(error)
    return ""


def draws(data: bytes) -> bool:
    """Whether ONNX Runtime gives two answers to the same input."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    answers = {session.run(["y"], {"x": np.ones(SIZE, np.float32)})[0].tobytes() for _ in range(4)}
    return len(answers) > 1


def drawing_models() -> Iterator[tuple[str, ModelProto]]:
    """The same draw wherever a model can have a node."""
    yield "main graph", model_of(draw())
    yield "dropout", model_of(drop(), weights=(RATE, ON))
    yield "branch", model_of(chosen(body(draw(output="t"))), weights=(YES,))
    within = node(
        "If", ["yes"], ["t"], then_branch=body(draw(output="u"), name="u"), else_branch=body(
            quiet(output="v"), name="v"
        ),
    )  # fmt: skip
    yield "branch of a branch", model_of(chosen(body(within)), weights=(YES,))
    one = numpy_helper.from_array(np.int64(1), "one")
    first = numpy_helper.from_array(np.array([0], np.int64), "first")
    loop = [repeated(draw(output="t")), node("Squeeze", ["rows", "first"], ["y"])]
    yield "loop", model_of(*loop, weights=(YES, one, first))
    call = node("block", ["x"], ["y"], domain="my")
    yield "function", model_of(call, functions=(function(draw()),))
    inner = function(draw(), name="inner")
    outer = function(node("inner", ["x"], ["y"], domain="my"))
    yield "function of a function", model_of(call, functions=(outer, inner))
    branch = function(constant(True, "yes"), chosen(body(draw(output="t"))))
    yield "branch of a function", model_of(call, functions=(branch,))
    # ONNX Runtime uses its operator of this name, and not the function.
    shadow = function(quiet(), name="RandomUniformLike", domain="")
    yield "shadowed", model_of(draw(), functions=(shadow,))


DRAWING = dict(drawing_models())


@pytest.mark.parametrize("case", DRAWING)
def test_a_node_that_draws_in_onnx_runtime_is_refused_at_any_depth(case: str) -> None:
    assert draws(DRAWING[case].SerializeToString())
    assert re.search(
        r"must not be served: the node '(\S*/)?(draw|drop)' is", refusal(DRAWING[case])
    )


def test_a_refusal_names_the_node_by_its_path() -> None:
    model = model_of(chosen(body(draw(output="t"))), weights=(YES,))
    assert refusal(model) == (
        "model.onnx must not be served: the node 'choose/then_branch/draw' is RandomUniformLike,"
        " which draws random numbers: export the module again, in eval mode"
    )


def test_a_function_that_nothing_calls_is_read_too() -> None:
    assert "'my:block/draw'" in refusal(model_of(quiet(), functions=(function(draw()),)))


def test_a_graph_passed_to_a_function_is_read_as_a_default_and_in_a_call() -> None:
    reads = node("If", ["x"], ["y"])
    for name in ("then_branch", "else_branch"):
        reads.attribute.add(name=name, ref_attr_name="g", type=AttributeProto.GRAPH)
    default = function(reads)
    default.attribute_proto.append(helper.make_attribute("g", body(draw(output="t"))))
    assert "draw" in refusal(model_of(quiet(), functions=(default,)))
    call = node("block", ["x"], ["y"], domain="my", g=body(draw(output="t")))
    assert "draw" in refusal(model_of(call, functions=(function(reads, attributes=("g",)),)))
    many = node("block", ["x"], ["y"], domain="my")
    many.attribute.append(helper.make_attribute("gs", [body(quiet(output="t")), body(draw())]))
    assert "draw" in refusal(model_of(many, functions=(function(quiet()),)))


@pytest.mark.parametrize(
    ("domain", "name"),
    [
        ("com.microsoft", "Sampling"),
        ("com.microsoft", "TrainableDropout"),
        ("ai.onnx.preview.training", "Adam"),
        ("", "Multinomial"),
        ("ai.onnx", "Bernoulli"),
    ],
)
def test_an_operator_that_draws_or_trains_is_refused_in_every_domain(
    domain: str, name: str
) -> None:
    assert "draws random" in (
        why := refusal(model_of(node(name, ["x"], ["y"], domain=domain)))
    ) or ("trains" in why)


def test_an_unknown_operator_is_refused_unless_it_is_a_function_of_the_model() -> None:
    strange = node("Strange", ["x"], ["y"], domain="my")
    assert "my::Strange, which is not known" in refusal(model_of(strange))
    assert refusal(model_of(strange, functions=(function(quiet(), name="Strange"),))) == ""
    # In a domain of ONNX Runtime there may be an operator of that name, which it prefers.
    newer = node("Strange", ["x"], ["y"], domain="com.microsoft")
    named = function(quiet(), name="Strange", domain="com.microsoft")
    assert "not known" in refusal(model_of(newer, functions=(named,)))
    assert "not known" in refusal(model_of(node("Strange", ["x"], ["y"])))


def test_an_opset_newer_than_the_table_is_refused() -> None:
    assert "opset 99 of ai.onnx" in refusal(model_of(quiet(), opset=99))


MODES: dict[str, tuple[ModelProto, bool]] = {
    "left out": (model_of(node("Dropout", ["x", "rate"], ["y"])), True),
    "empty": (model_of(node("Dropout", ["x", "rate", ""], ["y"])), True),
    "initializer off": (model_of(drop(), weights=(RATE, OFF)), True),
    "initializer on": (model_of(drop(), weights=(RATE, ON)), False),
    "constant off": (model_of(constant(False), drop()), True),
    "constant of one element": (model_of(constant([False]), drop()), True),
    "constant on": (model_of(constant(True), drop()), False),
    "computed": (model_of(constant(True, "on"), node("Not", ["on"], ["mode"]), drop()), False),
    "the caller's": (
        model_of(
            drop(), inputs=(X, helper.make_tensor_value_info("mode", TensorProto.BOOL, []))
        ),
        False,
    ),
    "overridable": (
        model_of(
            drop(),
            weights=(RATE, OFF),
            inputs=(X, helper.make_tensor_value_info("mode", TensorProto.BOOL, [])),
        ),
        False,
    ),
    "a number": (model_of(constant(np.int64(0)), drop()), False),
    "two booleans": (model_of(constant([False, False]), drop()), False),
    "no boolean": (model_of(constant(np.zeros(0, np.bool_)), drop()), False),
    "neither 0 nor 1": (
        model_of(
            drop(),
            weights=(RATE, TensorProto(name="mode", data_type=TensorProto.BOOL, int32_data=[256])),
        ),
        False,
    ),
    "given twice": (model_of(drop(), weights=(RATE, OFF, ON)), False),
    "made by nothing": (model_of(drop()), False),
    "from around a branch": (
        model_of(chosen(body(drop(output="t"))), weights=(RATE, YES, OFF)),
        True,
    ),
    "hidden in a branch": (
        model_of(
            chosen(body(drop(output="t"), weights=(OFF,))), weights=(RATE, YES, ON)
        ),
        False,
    ),
    "in a function": (
        model_of(
            node("block", ["x"], ["y"], domain="my"),
            functions=(function(constant(0.5, "rate"), constant(False), drop()),),
        ),
        True,
    ),
    "a function's input": (
        model_of(
            node("block", ["x", "mode"], ["y"], domain="my"),
            weights=(OFF,),
            functions=(
                helper.make_function(
                    "my", "block", ["x", "mode"], ["y"],
                    [constant(0.5, "rate"), drop()], [helper.make_opsetid("", 17)],
                ),
            ),
        ),
        False,
    ),
    "middle-aged": (model_of(node("Dropout", ["x"], ["y"], ratio=0.5), opset=10), True),
    "old": (model_of(node("Dropout", ["x"], ["y"]), opset=6), False),
    "old and set": (model_of(node("Dropout", ["x"], ["y"], is_test=1), opset=6), True),
    "bias dropout": (
        model_of(node("BiasDropout", ["x", "x", "", "rate"], ["y"], domain="com.microsoft")),
        True,
    ),
    "bias dropout on": (
        model_of(
            node("BiasDropout", ["x", "x", "", "rate", "mode"], ["y"], domain="com.microsoft"),
            weights=(RATE, ON),
        ),
        False,
    ),
    "norm": (model_of(node("BatchNormalization", ["x"] * 5, ["y"])), True),
    "norm off": (model_of(node("BatchNormalization", ["x"] * 5, ["y"], training_mode=0)), True),
    "norm on": (model_of(node("BatchNormalization", ["x"] * 5, ["y"], training_mode=1)), False),
    "norm with statistics": (
        model_of(node("BatchNormalization", ["x"] * 5, ["y", "m", "v", "", ""]), opset=9),
        False,
    ),
    "old norm": (model_of(node("BatchNormalization", ["x"] * 5, ["y"]), opset=6), False),
    "old norm set": (
        model_of(node("BatchNormalization", ["x"] * 5, ["y"], is_test=1), opset=6),
        True,
    ),
    "norm by a number": (
        model_of(node("BatchNormalization", ["x"] * 5, ["y"], training_mode=0.0)),
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_a_node_with_a_training_mode_is_accepted_only_when_the_mode_is_visibly_off(
    mode: str,
) -> None:
    model, is_off = MODES[mode]
    assert (refusal(model) == "") == is_off, refusal(model)


def test_a_training_mode_that_is_an_argument_of_a_function_is_refused() -> None:
    norm = node("BatchNormalization", ["x"] * 5, ["y"])
    norm.attribute.add(name="training_mode", ref_attr_name="k", type=AttributeProto.INT)
    call = node("block", ["x"], ["y"], domain="my", k=0)
    model = model_of(call, functions=(function(norm, attributes=("k",)),))
    assert "training mode" in refusal(model)


def test_a_training_mode_in_a_graph_passed_to_a_function_is_refused() -> None:
    graph = body(constant(False), drop(output="t"))
    call = node("block", ["x"], ["y"], domain="my", g=graph)
    model = model_of(call, functions=(function(quiet(), attributes=("g",)),))
    assert "training mode" in refusal(model)


def nested(number: int, content: bytes) -> bytes:
    """A serialised field of bytes."""

    def number_of(value: int) -> bytes:
        written = bytearray()
        while value > 127:
            written.append(value & 127 | 128)
            value >>= 7
        return bytes([*written, value])

    return number_of(number << 3 | 2) + number_of(len(content)) + content


def without(message: object, field: str) -> bytes:
    copy = type(message)()
    copy.CopyFrom(message)  # type: ignore[attr-defined]
    copy.ClearField(field)
    return copy.SerializeToString()  # type: ignore[no-any-return]


def test_parts_that_protobuf_merges_are_refused() -> None:
    """Each part alone is quiet; protobuf merges them into a Dropout that is on."""
    split = model_of(drop(), weights=(RATE, OFF))
    graph = without(split.graph, "initializer")
    modes = GraphProto(initializer=[RATE, ON]).SerializeToString()
    merged = without(split, "graph") + nested(7, graph) + nested(7, modes)
    assert draws(merged)
    assert "repeats field 7 of a ModelProto" in refusal(merged)


@pytest.mark.parametrize("number", [3, 4, 7])
def test_a_node_with_two_names_operators_or_domains_is_refused(number: int) -> None:
    first = quiet()
    first.domain = "ai.onnx"
    twice = nested(number, b"Bernoulli")
    model = without(model_of(), "graph") + nested(
        7, model_of().graph.SerializeToString() + nested(1, first.SerializeToString() + twice)
    )
    assert f"repeats field {number} of a NodeProto" in refusal(model)


def test_a_field_that_onnx_does_not_have_is_refused() -> None:
    assert "byte 0 begins an unknown field of a ModelProto" in refusal(
        nested(200, b"later") + model_of(quiet()).SerializeToString()
    )


@pytest.mark.parametrize("tag", [0x3B, 0x06, 0x00], ids=["a group", "wire type 6", "number 0"])
def test_bytes_that_are_no_field_are_refused(tag: int) -> None:
    data = bytes([tag, 1]) + model_of(quiet()).SerializeToString()
    assert "is not an ONNX model: byte 0 is no protobuf field" in refusal(data)


def test_a_tag_in_more_bytes_than_needed_is_the_same_tag() -> None:
    """protobuf reads 0x8a 0x00 as it reads 0x0a."""
    graph = model_of().graph.SerializeToString()
    long_tag = b"\x8a\x00" + nested(1, draw().SerializeToString())[1:]
    data = without(model_of(), "graph") + nested(7, graph + long_tag)
    assert draws(data)
    assert "draws random numbers" in refusal(data)


@pytest.mark.parametrize("end", range(1, 60, 7))
def test_a_truncated_model_is_refused(end: int) -> None:
    data = model_of(draw()).SerializeToString()
    assert refusal(data[: len(data) - end])


def test_a_model_without_a_graph_is_refused() -> None:
    assert "it holds no graph" in refusal(b"")
    assert "it holds no graph" in refusal(without(model_of(quiet()), "graph"))


def test_two_opsets_of_a_domain_are_refused() -> None:
    model = model_of(quiet())
    model.opset_import.append(helper.make_opsetid("ai.onnx", 11))
    assert "imports opsets 17 and 11 of ai.onnx" in refusal(model)


def test_a_dropout_without_an_opset_is_refused() -> None:
    model = model_of(node("Dropout", ["x"], ["y"]))
    del model.opset_import[0]
    assert "training mode" in refusal(model)


def test_weights_in_another_file_are_refused_in_every_kind_of_tensor() -> None:
    elsewhere = TensorProto(name="far", data_type=TensorProto.FLOAT, dims=[SIZE])
    elsewhere.data_location = TensorProto.EXTERNAL
    elsewhere.external_data.add(key="location", value="weights.bin")
    assert "'far' are in another file" in refusal(model_of(quiet(), weights=(elsewhere,)))
    held = node("Constant", [], ["y"], value=elsewhere)
    assert "far' are in another file" in refusal(model_of(held))
    sparse = onnx.SparseTensorProto(values=elsewhere, dims=[SIZE])
    model = model_of(quiet())
    model.graph.sparse_initializer.append(sparse)
    assert "'far' are in another file" in refusal(model)


def test_onnx_runtimes_own_format_is_refused(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    onnxruntime.InferenceSession(
        model_of(draw()).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    data = (tmp_path / "model.ort").read_bytes()
    assert draws(data)
    assert "ONNX Runtime's own format" in refusal(data)


def test_weights_are_skipped_and_not_copied() -> None:
    weights = [numpy_helper.from_array(np.zeros(1 << 20, np.float32), f"w{i}") for i in range(16)]
    held = node("Constant", [], ["held"], value=weights[0])
    data = model_of(quiet(), held, weights=tuple(weights)).SerializeToString()
    tracemalloc.start()
    check_operators(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20 < len(data)


def test_graphs_nested_deeper_than_protobuf_reads_are_refused() -> None:
    graph = b""
    for _ in range(120):
        attribute = nested(1, b"then_branch") + nested(6, graph)
        graph = nested(1, nested(4, b"If") + nested(5, attribute))
    assert "its graphs are nested more than" in refusal(
        without(model_of(), "graph") + nested(7, graph)
    )


def test_no_change_of_one_byte_makes_a_drawing_model_open_and_draw() -> None:
    data = model_of(draw()).SerializeToString()
    for position in range(len(data)):
        for value in range(256):
            changed = data[:position] + bytes([value]) + data[position + 1 :]
            assert refusal(changed) or not loads_and_draws(changed), (position, value)


def loads_and_draws(data: bytes) -> bool:
    try:
        return draws(data)
    except Exception:  # ONNX Runtime's exceptions share no base class
        return False
