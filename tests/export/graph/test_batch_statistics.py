"""The rule training-mode on normalisations: batch statistics fail, all other statistics pass."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from evalmode.bundle.certificate import Verdict
from evalmode.export.convert import convert
from evalmode.export.graph import Graph, graph_of
from evalmode.export.rules import training_mode
from evalmode.export.rules.subject import Subject

WEIGHTS = {"scale": np.ones(4, np.float32), "shift": np.zeros(4, np.float32)}
ROWS = {"axes": np.array([0])}


def verdict_of(graph: Graph) -> Verdict:
    return training_mode.check(Subject(graph=graph)).verdict


def build_graph(
    *nodes: onnx.NodeProto,
    shape: Sequence[int | str] = ("batch", 4),
    opset: int = 20,
    functions: Sequence[onnx.FunctionProto] = (),
    **constants: np.ndarray,
) -> Graph:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "main", [x], [y], initializers),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("my", 1)],
        functions=functions,
        ir_version=10,
    )
    return graph_of(model)


def node(op: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=f"{op}_{output}", **attributes)


def statistics(axes: str = "axes") -> list[onnx.NodeProto]:
    """The nodes that compute the mean and the variance of h over these axes."""
    return [
        node("ReduceMean", f"h {axes}", "mean", keepdims=0),
        node("ReduceMean", f"h {axes}", "row_of_means", keepdims=1),
        node("Sub", "h row_of_means", "centred"),
        node("Mul", "centred centred", "square"),
        node("ReduceMean", f"square {axes}", "variance", keepdims=0),
    ]


NORM = node("BatchNormalization", "h scale shift mean variance", "y")


@pytest.mark.parametrize("opset", [18, 20])
def test_a_batch_normalization_by_the_statistics_of_its_input_fails(opset: int) -> None:
    graph = build_graph(node("Tanh", "x", "h"), *statistics(), NORM, opset=opset, **WEIGHTS, **ROWS)
    assert verdict_of(graph) is Verdict.FAIL


def test_statistics_with_axes_as_an_attribute_fail_too() -> None:
    nodes = [
        node("ReduceMean", "x", "mean", axes=[0], keepdims=0),
        node("Mul", "x x", "square"),
        node("ReduceMean", "square", "variance", axes=[0], keepdims=0),
        node("BatchNormalization", "x scale shift mean variance", "y"),
    ]
    assert verdict_of(build_graph(*nodes, opset=9, **WEIGHTS)) is Verdict.FAIL


def test_statistics_that_a_function_computes_fail() -> None:
    function = helper.make_function(
        "my",
        "Statistics",
        ["h", "axes"],
        ["mean", "variance"],
        statistics(),
        [helper.make_opsetid("", 20)],
    )
    call = helper.make_node("Statistics", ["x", "axes"], ["m", "v"], domain="my")
    norm = node("BatchNormalization", "x scale shift m v", "y")
    assert (
        verdict_of(build_graph(call, norm, functions=[function], **WEIGHTS, **ROWS)) is Verdict.FAIL
    )


def test_statistics_from_another_operator_are_unproven() -> None:
    nodes = [
        node("Gather", "x first", "mean", axis=0),
        node("BatchNormalization", "x scale shift mean shift", "y"),
    ]
    graph = build_graph(*nodes, first=np.array(0), **WEIGHTS)
    assert verdict_of(graph) is Verdict.UNPROVEN


def test_running_statistics_and_values_computed_from_constants_pass() -> None:
    running = {"mean": np.zeros(4, np.float32), "variance": np.ones(4, np.float32)}
    norm = node("BatchNormalization", "x scale shift mean variance", "y")
    assert verdict_of(build_graph(norm, **WEIGHTS, **running)) is Verdict.PASS
    nodes = [node("Add", "mean mean", "double"), node("Abs", "variance", "positive")]
    norm = node("BatchNormalization", "x scale shift double positive", "y")
    assert verdict_of(build_graph(*nodes, norm, **WEIGHTS, **running)) is Verdict.PASS


def test_an_instance_normalisation_in_the_form_of_a_batch_normalisation_passes() -> None:
    nodes = [
        node("Reshape", "x one_row", "h"),
        *statistics(),
        node("BatchNormalization", "h scale shift mean variance", "y"),
    ]
    graph = build_graph(
        *nodes,
        one_row=np.array([1, 4, -1]),
        axes=np.array([0, 2]),
        scale=WEIGHTS["scale"],
        shift=WEIGHTS["shift"],
    )
    assert verdict_of(graph) is Verdict.PASS


class ByHand(nn.Module):
    """A linear layer, then (h - mean) / deviation over these axes, without a BatchNorm module."""

    def __init__(self, *axes: int, multiply: bool = False) -> None:
        super().__init__()
        self.linear, self.axes, self.multiply = nn.Linear(4, 4), axes, multiply

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.linear(x))
        variance, mean = torch.var_mean(h, self.axes, unbiased=False, keepdim=True)
        if self.multiply:
            return (h - mean) * torch.rsqrt(variance + 1e-5)
        return (h - mean) / (variance + 1e-5).sqrt()


def export_graph(module: nn.Module, *, axis: str = "batch", shape: Sequence[int] = (3, 4)) -> Graph:
    (name,) = inspect.signature(module.forward).parameters
    inputs = {name: torch.randn(*shape)}
    converted = convert(module.eval(), inputs, dynamic_axes={name: {0: axis}}, outputs=["y"])
    return graph_of(converted.model)


@pytest.mark.parametrize("multiply", [False, True])
def test_a_normalisation_over_the_batch_axis_fails(multiply: bool) -> None:
    assert verdict_of(export_graph(ByHand(0, multiply=multiply))) is Verdict.FAIL
    assert (
        verdict_of(export_graph(ByHand(0, 1, multiply=multiply), shape=(3, 5, 4))) is Verdict.FAIL
    )
    inside = nn.Sequential(nn.Linear(4, 4), ByHand(0, multiply=multiply), nn.Linear(4, 2))
    assert verdict_of(export_graph(inside)) is Verdict.FAIL


@pytest.mark.parametrize("multiply", [False, True])
def test_a_normalisation_over_another_axis_passes(multiply: bool) -> None:
    assert verdict_of(export_graph(ByHand(1, multiply=multiply))) is Verdict.PASS
    assert (
        verdict_of(export_graph(ByHand(1, 2, multiply=multiply), shape=(3, 5, 4))) is Verdict.PASS
    )
    assert verdict_of(export_graph(ByHand(0, multiply=multiply), axis="points")) is Verdict.PASS


@pytest.mark.parametrize("module", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4)])
def test_layer_group_and_instance_normalisations_pass(module: nn.Module) -> None:
    assert verdict_of(export_graph(module, shape=(3, 4, 4))) is Verdict.PASS


def test_a_variance_over_the_batch_that_normalises_nothing_passes() -> None:
    class Spread(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.var(0)

    assert verdict_of(export_graph(Spread())) is Verdict.PASS
