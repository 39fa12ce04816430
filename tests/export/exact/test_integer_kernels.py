"""Exact graphs with products of bytes: the bits of the float graph, and a proof of their own."""

from __future__ import annotations

import copy
import platform
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from evalmode.bundle.session import open_session
from evalmode.errors import EvalmodeError
from evalmode.export.convert import convert
from evalmode.export.exact.integer_kernels import with_integer_kernels
from evalmode.export.exact.lean_graph import lean_graph
from evalmode.export.exact.limits import Limits
from evalmode.export.exact.statements import statements_of
from evalmode.export.from_checkpoint import release_checkpoint
from evalmode.export.graph import graph_of
from evalmode.model.exact.network import ExactTransformer
from evalmode.model.transformer import Transformer
from tests.conftest import make_checkpoint, small_config
from tests.export.exact.small_exact_graphs import model, node
from tests.export.test_exact_network import LEVELS, OPERATORS, inputs_of, network


def exported(module: ExactTransformer) -> onnx.ModelProto:
    """The lean graph of a frozen copy, whose inputs have dynamic axes."""
    module = copy.deepcopy(module)
    module.freeze()
    inputs = inputs_of(module.config.ids_per_position, rows=3, length=9)
    axes = {name: {0: "batch", 1: "length"} for name in inputs}
    return lean_graph(convert(module, inputs, dynamic_axes=axes, outputs=["logits"]).model)


def limits_of(module: ExactTransformer) -> Limits:
    config = module.config
    return Limits(
        ranges={"input_ids": (0, config.vocabulary - 1), "attention_mask": (0, 1)},
        largest={"length": config.positions},
    )


def sums_of_bytes_are_exact(graph: onnx.ModelProto) -> bool:
    """Whether this processor adds products of bytes with 32 bits. Of those by Intel and AMD, only
    processors with VNNI do.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    features = open_session(graph.SerializeToString()).platform.cpu_features
    return not {"avx_vnni", "avx512_vnni"}.isdisjoint(features)


def answers_of(graph: onnx.ModelProto, inputs: list[dict[str, Tensor]], level: str) -> list[bytes]:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    answers = []
    for tensors in inputs:
        feed = {name: tensor.numpy() for name, tensor in tensors.items()}
        answers.append(np.asarray(session.run(None, feed)[0]).tobytes())
    return answers


@pytest.mark.parametrize(
    "changes",
    [{}, {"ids_per_position": 1, "ngram_dropout": 0.0, "causal": True}, {"weight_bits": 7}],
    ids=str,
)
def test_integer_kernels_give_the_bits_of_the_float_graph_for_every_row_count(
    changes: dict[str, object],
) -> None:
    module = network(**changes)
    graph = exported(module)
    integer = with_integer_kernels(graph, limits_of(module))
    # Four linear layers of each block, and the sum of a position's rows; the head reads 11 bits,
    # and q @ k no stored weights.
    operators = Counter(node.op_type for node in integer.graph.node)
    assert operators["MatMulInteger"] == 4 * module.config.layers + 1
    assert operators["Gemm"] == 1
    assert {*operators} <= OPERATORS | {"MatMulInteger", "Min"}

    groups = module.config.ids_per_position
    inputs = [inputs_of(groups, rows=rows, length=3 + rows % 7) for rows in range(1, 65)]
    expected = answers_of(graph, inputs, "ORT_ENABLE_ALL")
    # Elsewhere weights of 8 bits saturate, as the statement "integer-saturation" says.
    if module.config.weight_bits == 7 or sums_of_bytes_are_exact(integer):
        for level in LEVELS:
            assert answers_of(integer, inputs, level) == expected
    # The left operands of all four, each with a Floor before its Clip, are cast without it.
    floors = [sum(item.op_type == "Floor" for item in part.graph.node) for part in (graph, integer)]
    assert floors[0] - floors[1] == 4 * module.config.layers


def test_onnx_runtime_makes_one_operation_of_each_product_of_bytes(tmp_path: Path) -> None:
    module = network()
    integer = with_integer_kernels(exported(module), limits_of(module))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # it warns that such a file is for this machine
    ort.InferenceSession(integer.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(options.optimized_model_filepath)
    operators = Counter(node.op_type for node in optimized.graph.node)
    assert operators["MatMulIntegerToFloat"] == 4 * module.config.layers
    assert operators["MatMulInteger"] == 1  # the sum of table rows


@pytest.mark.parametrize("bits", [7, 8])
def test_integer_kernels_are_proved_and_only_weights_of_8_bits_may_saturate(bits: int) -> None:
    module = network(weight_bits=bits)
    integer = with_integer_kernels(exported(module), limits_of(module))
    exact, saturation = statements_of(graph_of(integer), limits_of(module))
    assert exact.why == "proved"
    assert saturation.holds == (bits == 7)


def test_only_weights_of_8_bits_times_a_power_of_two_become_integers() -> None:
    module = network()
    graph = exported(module)
    products = [node for node in graph.graph.node if node.op_type == "Gemm"]
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    # The weights (out, in) of one output are 1 and 128 units: a ninth bit with the sign.
    weight = tensors[products[0].input[1]]
    array = numpy_helper.to_array(weight).copy()
    array[0] = 0.0
    array[0, :2] = 2.0**-8, 128 * 2.0**-8
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    integer = with_integer_kernels(graph, limits_of(module))
    operators = Counter(node.op_type for node in integer.graph.node)
    assert operators["MatMulInteger"] == 4 * module.config.layers
    assert products[0] in integer.graph.node

    array[0, :2] = 2.0**-8, 127 * 2.0**-8
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    integer = with_integer_kernels(graph, limits_of(module))
    operators = Counter(node.op_type for node in integer.graph.node)
    assert operators["MatMulInteger"] == 4 * module.config.layers + 1


@pytest.mark.parametrize(
    ("fraction_bits", "high", "other_reader", "floors"),
    [
        (6, 127.0, False, 0),
        (16, 127.0, False, 0),  # 255 has 24 bits with 16 of a fraction
        (17, 127.0, False, 1),
        (6, 126.5, False, 1),  # 126.5 + 128 would become 254, and not 255
        (6, 300.0, False, 1),  # a cast of 255.5 to a byte has no meaning
        (6, 127.0, True, 2),
    ],
)
def test_a_floor_goes_where_the_cast_to_bytes_does_its_work(
    fraction_bits: int, high: float, other_reader: bool, floors: int
) -> None:
    rng = np.random.default_rng(0)
    unit = 2.0**-fraction_bits
    # From -128 to 127 with the finest fractions, but below 127 + 1 so that bytes hold the floors.
    table = (rng.integers(-128, 127, (9, 8)) + unit * rng.integers(0, 3, (9, 8))).astype(np.float32)
    end = [node("MatMul", ["clipped", "weights"])]
    if other_reader:
        end = [
            node("MatMul", ["clipped", "weights"], "products"),
            node("Floor", ["clipped"], "other"),
            node("Add", ["products", "other"]),
        ]
    graph = model(
        [
            node("Gather", ["table", "ids"], "x"),
            node("Floor", ["x"], "floored"),
            node("Clip", ["floored", "low", "high"], "clipped"),
            *end,
        ],
        inputs={"ids": (onnx.TensorProto.INT64, ["batch", "length"])},
        constants={
            "table": table,
            "low": np.float32(-128),
            "high": np.float32(high),
            # Of 7 bits, which saturate on no processor.
            "weights": rng.integers(-63, 64, (8, 8)).astype(np.float32),
        },
    )
    limits = Limits(ranges={"ids": (0, 8)})
    integer = with_integer_kernels(graph, limits)
    operators = Counter(item.op_type for item in integer.graph.node)
    assert operators["MatMulInteger"] == 1
    assert operators["Floor"] == floors
    assert statements_of(graph_of(integer), limits)[0].why == "proved"
    inputs = [{"ids": torch.arange(9).reshape(1, 9)}]
    for level in LEVELS:
        assert answers_of(integer, inputs, level) == answers_of(graph, inputs, level)


def test_a_product_of_unknown_range_stays_as_it_is() -> None:
    # Without the range of the ids nothing is known of what the products read.
    graph = exported(network())
    integer = with_integer_kernels(graph, Limits())
    assert [node.op_type for node in integer.graph.node] == [
        node.op_type for node in graph.graph.node
    ]


def test_integer_kernels_of_a_float32_checkpoint_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpoint = make_checkpoint(Transformer(small_config()).eval())
    with pytest.raises(EvalmodeError, match="--kernels integer is for exact networks"):
        release_checkpoint(
            checkpoint,
            root=tmp_path,
            name="small",
            version="1",
            progress=lambda step: None,
            kernels="integer",
        )
    assert not any(tmp_path.iterdir())
