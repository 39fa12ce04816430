from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evalmode.bundle.certificate import Record, Severity, Verdict
from evalmode.export.graph import graph_of
from evalmode.export.rules import stochastic_op
from evalmode.export.rules.subject import Subject

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
C = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
DRAW = helper.make_node("RandomUniformLike", ["x"], ["y"], name="draw")
HALF = helper.make_tensor("half", TensorProto.FLOAT, [], [0.5])


def record_of(*nodes: onnx.NodeProto, opset: int = 20, **extra: object) -> Record:
    graph = helper.make_graph(nodes, "main", [X, C], [Y], [HALF])
    opsets = [helper.make_opsetid("", opset)] if opset else [helper.make_opsetid("my", 1)]
    model = helper.make_model(graph, opset_imports=opsets, **extra)
    return stochastic_op.check(Subject(graph=graph_of(model)))


def paths(record: Record) -> list[str]:
    return [f"{finding.node} ({finding.op})" for finding in record.findings]


@pytest.mark.parametrize(
    ("op", "opset"),
    [
        *(
            ("RandomUniformLike", 1),
            ("RandomNormalLike", 1),
            ("RandomUniform", 1),
            ("RandomNormal", 1),
        ),
        *(
            ("Multinomial", 7),
            ("Bernoulli", 15),
            ("RandomUniformLike", 22),
            ("Bernoulli", 22),
            ("Multinomial", 22),
        ),
    ],
)
def test_an_operator_that_draws_fails_and_is_named(op: str, opset: int) -> None:
    record = record_of(helper.make_node(op, ["x"], ["y"], name="the_node"), opset=opset)
    assert record.verdict is Verdict.FAIL
    assert paths(record) == [f"the_node ({op})"]
    assert record.findings[0].severity is Severity.ERROR
    assert "eval mode" in record.findings[0].fix


@pytest.mark.parametrize("opset", [0, 6, 9999])
def test_an_operator_that_draws_fails_under_any_opset(opset: int) -> None:
    assert (
        record_of(helper.make_node("Bernoulli", ["x"], ["y"]), opset=opset).verdict is Verdict.FAIL
    )


def test_an_operator_with_a_seed_fails_too() -> None:
    assert (
        record_of(helper.make_node("RandomUniformLike", ["x"], ["y"], seed=1.0)).verdict
        is Verdict.FAIL
    )


def test_the_standard_domain_may_be_written_out() -> None:
    assert (
        record_of(helper.make_node("Bernoulli", ["x"], ["y"], domain="ai.onnx")).verdict
        is Verdict.FAIL
    )


@pytest.mark.parametrize("op", ["Sampling", "RandomNormal", "RandomUniform"])
def test_an_operator_of_the_runtime_that_draws_fails_although_onnx_has_no_schema_for_it(
    op: str,
) -> None:
    record = record_of(helper.make_node(op, ["x"], ["y"], name="the_node", domain="com.microsoft"))
    assert paths(record) == [f"the_node (com.microsoft::{op})"]


@pytest.mark.parametrize(
    ("op", "domain"),
    [
        ("Relu", ""),
        ("AffineGrid", ""),
        ("Dropout", ""),
        ("FusedMatMul", "com.microsoft"),
        ("RandomUniformLike", "my"),
    ],
)
def test_an_operator_that_draws_nothing_itself_passes(op: str, domain: str) -> None:
    record = record_of(helper.make_node(op, ["x"], ["y"], domain=domain))
    assert record.verdict is Verdict.PASS
    assert record.measured == "0 of 1 nodes"


def test_a_draw_is_found_in_a_subgraph_of_a_subgraph() -> None:
    inner = helper.make_graph([DRAW], "inner", [], [Y])
    branch = helper.make_node(
        "If", ["c"], ["y"], name="inside", then_branch=inner, else_branch=inner
    )
    outer = helper.make_graph([branch], "outer", [], [Y])
    top = helper.make_node("If", ["c"], ["y"], name="outside", then_branch=outer, else_branch=outer)
    found_paths = paths(record_of(top))
    assert "outside/then_branch/inside/else_branch/draw (RandomUniformLike)" in found_paths
    assert len(found_paths) == 4


@pytest.mark.parametrize("op", ["Loop", "Scan", "SequenceMap"])
def test_a_draw_is_found_in_every_operator_that_has_a_body(op: str) -> None:
    body = helper.make_graph([DRAW], "body", [], [Y])
    assert paths(record_of(helper.make_node(op, ["x"], ["y"], name="n", body=body))) == [
        f"n/body/draw ({DRAW.op_type})"
    ]


def function(name: str, *nodes: onnx.NodeProto) -> onnx.FunctionProto:
    return helper.make_function("my", name, ["x"], ["y"], nodes, [helper.make_opsetid("", 20)])


def test_a_draw_is_found_in_a_local_function_at_each_of_its_calls() -> None:
    calls = [
        helper.make_node(
            "noisy", [input_name], [output_name], domain="my", name=f"to_{output_name}"
        )
        for input_name, output_name in ("xh", "hy")
    ]
    found_paths = paths(record_of(*calls, functions=[function("noisy", DRAW)]))
    assert found_paths == [f"to_{name}/my:noisy/draw (RandomUniformLike)" for name in "hy"]


def test_a_draw_is_found_in_a_function_that_another_function_calls_in_a_branch() -> None:
    call = helper.make_node("noisy", ["x"], ["y"], domain="my", name="inner")
    branch = helper.make_graph([call], "branch", [], [Y])
    mode = helper.make_node(
        "Constant", [], ["c"], value=numpy_helper.from_array(numpy_helper.to_array(HALF) > 0)
    )
    choice = helper.make_node("If", ["c"], ["y"], name="if", then_branch=branch, else_branch=branch)
    functions = [function("noisy", DRAW), function("outer", mode, choice)]
    top = helper.make_node("outer", ["x"], ["y"], domain="my", name="top")
    found_paths = paths(record_of(top, functions=functions))
    assert found_paths[0] == "top/my:outer/if/else_branch/inner/my:noisy/draw (RandomUniformLike)"


def test_a_draw_in_a_function_that_nothing_calls_fails_and_the_finding_says_so() -> None:
    record = record_of(helper.make_node("Relu", ["x"], ["y"]), functions=[function("noisy", DRAW)])
    assert paths(record) == ["my:noisy/draw (RandomUniformLike)"]
    (finding,) = record.findings
    assert finding.severity is Severity.ERROR
    assert finding.why == "it draws random numbers; it is in a function that nothing calls"


def test_a_draw_in_a_function_that_is_called_is_not_reported_as_dead() -> None:
    call = helper.make_node("noisy", ["x"], ["y"], domain="my")
    (finding,) = record_of(call, functions=[function("noisy", DRAW)]).findings
    assert finding.why == "it draws random numbers"


def test_a_function_named_like_an_operator_that_draws_is_checked_by_its_nodes() -> None:
    quiet = function("RandomUniformLike", helper.make_node("Identity", ["x"], ["y"]))
    call = helper.make_node("RandomUniformLike", ["x"], ["y"], domain="my")
    assert record_of(call, functions=[quiet]).verdict is Verdict.PASS


def chain(*steps: tuple[str, str]) -> list[onnx.NodeProto]:
    """Nodes in sequence; each also reads the extra inputs that its step names."""
    names = [*[f"h{index}" for index in range(len(steps) - 1)], "y"]
    nodes = []
    for index, (op, extra_inputs) in enumerate(steps):
        before = names[index - 1] if index else "x"
        nodes.append(helper.make_node(op, [before, *extra_inputs.split()], [names[index]]))
    return nodes


@pytest.mark.parametrize(
    "steps",
    [
        [
            ("RandomUniformLike", ""),
            ("GreaterOrEqual", "half"),
            ("Cast", ""),
            ("Mul", "x"),
            ("Div", "half"),
        ],
        [("RandomUniformLike", ""), ("Less", "half"), ("Cast", ""), ("Div", "half"), ("Mul", "x")],
        [("RandomUniformLike", ""), ("Add", "half"), ("Floor", ""), ("Mul", "x")],
        [("RandomUniformLike", ""), ("Greater", "half"), ("Not", ""), ("Where", "x half")],
        [("Bernoulli", ""), ("Mul", "x")],
    ],
    ids=["dropout", "in place", "drop path", "chosen", "bernoulli"],
)
def test_a_hand_written_dropout_is_recognised(steps: list[tuple[str, str]]) -> None:
    (finding,) = record_of(*chain(*steps)).findings
    assert "a hand-written dropout" in finding.why


@pytest.mark.parametrize(
    "steps",
    [[("RandomNormalLike", ""), ("Add", "x")], [("RandomUniformLike", ""), ("Mul", "x")]],
    ids=["added", "scaled"],
)
def test_other_noise_is_not_called_a_dropout(steps: list[tuple[str, str]]) -> None:
    (finding,) = record_of(*chain(*steps)).findings
    assert finding.why == "it draws random numbers"
