from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from evalmode.bundle.certificate import Verdict
from evalmode.export.checks import stochastic_op

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
DRAW = helper.make_node("RandomUniformLike", ["x"], ["y"], name="draw")


def model_of(nodes: list[onnx.NodeProto], **extra: object) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "main", [X], [Y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], **extra)


@pytest.mark.parametrize("op", ["RandomUniformLike", "RandomNormalLike", "Bernoulli", "Multinomial"])
def test_an_operator_that_draws_fails_and_is_named(op: str) -> None:
    record = stochastic_op.check(model_of([helper.make_node(op, ["x"], ["y"], name="the_node")]))
    assert record.verdict is Verdict.FAIL
    assert record.where == (f"the_node ({op})",)


@pytest.mark.parametrize("op", ["Sampling", "RandomNormal", "RandomUniform"])
def test_an_operator_that_draws_in_microsofts_domain_fails_though_onnx_has_no_schema_of_it(op: str) -> None:
    node = helper.make_node(op, ["x"], ["y"], name="the_node", domain="com.microsoft")
    assert stochastic_op.check(model_of([node])).where == (f"the_node ({op})",)


def test_a_quiet_operator_in_microsofts_domain_passes() -> None:
    node = helper.make_node("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft")
    assert stochastic_op.check(model_of([node])).verdict is Verdict.PASS


def test_a_graph_without_one_passes() -> None:
    assert stochastic_op.check(model_of([helper.make_node("Relu", ["x"], ["y"])])).verdict is Verdict.PASS


def test_affine_grid_is_no_false_alarm() -> None:
    node = helper.make_node("AffineGrid", ["x", "size"], ["y"])
    assert stochastic_op.check(model_of([node])).verdict is Verdict.PASS


def test_an_operator_of_the_same_name_in_another_domain_is_another_operator() -> None:
    node = helper.make_node("RandomUniformLike", ["x"], ["y"], domain="my")
    assert stochastic_op.check(model_of([node])).verdict is Verdict.PASS


def test_it_is_found_in_a_subgraph_of_a_subgraph() -> None:
    inner = helper.make_graph([DRAW], "inner", [], [Y])
    branch = helper.make_node("If", ["c"], ["y"], name="inside", then_branch=inner, else_branch=inner)
    outer = helper.make_graph([branch], "outer", [], [Y])
    top = helper.make_node("If", ["c"], ["y"], name="outside", then_branch=outer, else_branch=outer)
    record = stochastic_op.check(model_of([top]))
    assert "outside/then_branch/inside/else_branch/draw (RandomUniformLike)" in record.where
    assert len(record.where) == 4


def test_it_is_found_in_a_local_function() -> None:
    function = helper.make_function("my", "noisy", ["x"], ["y"], [DRAW], [helper.make_opsetid("", 20)])
    call = helper.make_node("noisy", ["x"], ["y"], domain="my")
    record = stochastic_op.check(model_of([call], functions=[function]))
    assert record.where == ("my:noisy/draw (RandomUniformLike)",)
