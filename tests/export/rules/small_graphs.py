"""Small subjects for the tests of rules: graphs with a few nodes, modules of one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from evalmode.bundle.certificate import Record
from evalmode.bundle.known_answers import Tensors
from evalmode.export.graph import graph_of
from evalmode.export.inputs.evidence import Evidence
from evalmode.export.module.network import Network
from evalmode.export.rules.subject import Subject

ROWS = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)


class Calls(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(x)


def graph(
    *nodes: onnx.NodeProto,
    rows: int | str = "batch",
    kind: int = TensorProto.FLOAT,
    **constants: np.ndarray,
) -> onnx.ModelProto:
    """A model of these nodes, from x with four columns to y."""
    input_info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 4])
    output_info = helper.make_tensor_value_info("y", kind, None)
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(
        helper.make_graph(nodes, "g", [input_info], [output_info], initializers),
        opset_imports=opsets,
        ir_version=9,
    )


def node(op: str, *inputs: str, output: str = "y", **attributes: object) -> onnx.NodeProto:
    """A node with one output."""
    return helper.make_node(op, list(inputs), [output], name=f"/{op}_{output}", **attributes)


DOUBLED = graph(node("Add", "x", "x"))


def small_subject(
    model: onnx.ModelProto, answer: Callable[[Tensor], Tensor] = lambda x: x + x, **evidence: object
) -> Subject:
    """A graph and the module to compare it with; the probes have eight rows and one row."""
    parts = {
        "probes": [{"x": ROWS}, {"x": ROWS[:1]}],
        "rows": {4: [{"x": row[np.newaxis]} for row in ROWS]},
        "dynamic_axes": {"x": {0: "batch"}},
        **evidence,
    }
    return subject_of_graph(model, Calls(answer).eval(), **parts)


def subject_of_graph(model: onnx.ModelProto, module: nn.Module, **evidence: Any) -> Subject:
    """A graph and the module to compare it with, with this evidence."""
    return Subject(network=Network.of(module), graph=graph_of(model), evidence=Evidence(**evidence))


def subject_of_module(module: nn.Module, probes: Sequence[Tensors] = ()) -> Subject:
    """A module before it is exported."""
    return Subject(network=Network.of(module), evidence=Evidence(probes=probes))


def messages(record: Record) -> str:
    """The messages of all findings, in one string."""
    return "; ".join(map(str, record.findings))
