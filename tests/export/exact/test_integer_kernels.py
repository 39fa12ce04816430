"""Exact graphs with products of bytes: the bits of the float graph, and a proof of their own."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

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
        answers.append(np.asarray(session.run(["logits"], feed)[0]).tobytes())
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
    # Four linear layers of each block; the head reads 11 bits, and q @ k no stored weights.
    operators = Counter(node.op_type for node in integer.graph.node)
    assert operators["MatMulInteger"] == 4 * module.config.layers
    assert operators["Gemm"] == 1
    assert {*operators} <= OPERATORS | {"MatMulInteger"}

    groups = module.config.ids_per_position
    inputs = [inputs_of(groups, rows=rows, length=3 + rows % 7) for rows in range(1, 65)]
    expected = answers_of(graph, inputs, "ORT_ENABLE_ALL")
    for level in LEVELS:
        assert answers_of(integer, inputs, level) == expected


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
    assert operators["MatMulInteger"] == 4 * module.config.layers - 1
    assert products[0] in integer.graph.node

    array[0, :2] = 2.0**-8, 127 * 2.0**-8
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    integer = with_integer_kernels(graph, limits_of(module))
    operators = Counter(node.op_type for node in integer.graph.node)
    assert operators["MatMulInteger"] == 4 * module.config.layers


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
