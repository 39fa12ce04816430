"""Exact graphs without what costs ONNX Runtime time."""

from __future__ import annotations

import onnx

from tests.export.exact.test_integer_kernels import exported
from tests.export.test_exact_network import network


def test_a_lean_graph_has_no_inner_shapes_and_looks_exponentials_up_by_int32() -> None:
    graph = exported(network()).graph
    assert not graph.value_info
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    reshapes = {node.output[0]: node for node in graph.node if node.op_type == "Reshape"}
    lookups = [node for node in graph.node if node.op_type == "GatherElements"]
    assert lookups
    for node in lookups:
        cast = casts[reshapes[node.input[1]].input[0]]
        assert cast.attribute[0].i == onnx.TensorProto.INT32
