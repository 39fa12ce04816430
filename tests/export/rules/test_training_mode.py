from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evalmode.bundle.certificate import Finding, Verdict
from evalmode.bundle.errors import BundleNotCertified
from evalmode.bundle.operators import check_operators
from evalmode.export.graph import graph_of
from evalmode.export.rules import training_mode
from evalmode.export.rules.subject import Subject

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
MODE = helper.make_tensor_value_info("mode", TensorProto.BOOL, [])
RATE = helper.make_tensor_value_info("rate", TensorProto.FLOAT, [])
R, ON, OFF = {"r": np.float32(0.5)}, {"m": np.True_}, {"m": np.False_}
DOMAINS = ("com.microsoft", "com.ms.internal.nhwc", "ai.onnx.preview.training", "my")


def model_of(
    node: onnx.NodeProto,
    *,
    opset: int,
    constants: dict[str, object] | None = None,
    inputs: tuple[onnx.ValueInfoProto, ...] = (),
    before: tuple[onnx.NodeProto, ...] = (),
    functions: tuple[onnx.FunctionProto, ...] = (),
) -> onnx.ModelProto:
    initializers = [
        numpy_helper.from_array(np.asarray(value), name)
        for name, value in (constants or {}).items()
    ]
    graph = helper.make_graph([*before, node], "main", [X, *inputs], [Y], initializers)
    opsets = [
        helper.make_opsetid("", opset),
        *(helper.make_opsetid(domain, 1) for domain in DOMAINS),
    ]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)


def verdict_of(node: onnx.NodeProto, **options: object) -> Verdict:
    model = model_of(node, **options)  # type: ignore[arg-type]
    verdict = training_mode.check(Subject(graph=graph_of(model))).verdict
    if verdict is not Verdict.PASS:  # then it is not opened to serve either
        with pytest.raises(BundleNotCertified):
            check_operators(model.SerializeToString())
    return verdict


def finding_of(node: onnx.NodeProto, **options: object) -> Finding:
    (finding,) = training_mode.check(Subject(graph=graph_of(model_of(node, **options)))).findings  # type: ignore[arg-type]
    return finding


def dropout(*more: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node("Dropout", ["x", *more], ["y"], name="drop", **attributes)


def batch_normalization(outputs: int = 1, domain: str = "", **attributes: object) -> onnx.NodeProto:
    names = ["y", "mean", "variance", "saved_mean", "saved_variance"][:outputs]
    return helper.make_node(
        "BatchNormalization", ["x"] * 5, names, name="norm", domain=domain, **attributes
    )


@pytest.mark.parametrize("opset", [1, 6])
def test_dropout_before_opset_7_trains_unless_is_test_or_a_rate_of_0_is_set(opset: int) -> None:
    assert verdict_of(dropout(), opset=opset) is Verdict.FAIL
    assert verdict_of(dropout(is_test=0), opset=opset) is Verdict.FAIL
    assert verdict_of(dropout(is_test=1), opset=opset) is Verdict.PASS
    assert verdict_of(dropout(ratio=0.0), opset=opset) is Verdict.PASS
    assert verdict_of(dropout(ratio=0.1), opset=opset) is Verdict.FAIL


@pytest.mark.parametrize("opset", [7, 10])
def test_dropout_of_opset_7_to_11_never_trains(opset: int) -> None:
    assert verdict_of(dropout(ratio=0.5), opset=opset) is Verdict.PASS


@pytest.mark.parametrize("opset", [12, 13, 20, 22])
def test_dropout_from_opset_12_is_checked_by_its_mode_input(opset: int) -> None:
    assert verdict_of(dropout(), opset=opset) is Verdict.PASS
    assert verdict_of(dropout("r"), opset=opset, constants=R) is Verdict.PASS
    assert verdict_of(dropout("r", ""), opset=opset, constants=R) is Verdict.PASS
    assert verdict_of(dropout("r", "m"), opset=opset, constants=R | OFF) is Verdict.PASS
    assert verdict_of(dropout("r", "m"), opset=opset, constants=R | ON) is Verdict.FAIL
    assert verdict_of(dropout("", "m"), opset=opset, constants=ON) is Verdict.FAIL
    assert (
        verdict_of(dropout("r", "m"), opset=opset, constants={"r": np.float32(0)} | ON)
        is Verdict.PASS
    )
    assert (
        verdict_of(dropout("r", "m"), opset=opset, constants={"r": np.float32(np.nan)} | ON)
        is Verdict.FAIL
    )


def test_a_mode_that_is_on_fails_whatever_decides_the_rate() -> None:
    assert verdict_of(dropout("rate", "m"), opset=20, constants=ON, inputs=(RATE,)) is Verdict.FAIL


def test_a_rate_of_0_passes_whatever_decides_the_mode() -> None:
    zero = {"r": np.float16(0)}
    assert (
        verdict_of(dropout("r", "mode"), opset=20, constants=zero, inputs=(MODE,)) is Verdict.PASS
    )


def test_a_finding_names_the_node_the_operator_and_the_rate() -> None:
    finding = finding_of(dropout("r", "m"), opset=20, constants=R | ON)
    assert str(finding) == "drop (Dropout-20): its training mode is on: it drops at a rate of 0.5"
    assert ".eval()" in finding.fix


def test_a_mode_that_the_caller_decides_is_unproven_and_the_finding_says_so() -> None:
    for constants in ({}, {"mode": False}, {"mode": True}):
        node = dropout("", "mode")
        assert verdict_of(node, opset=20, inputs=(MODE,), constants=constants) is Verdict.UNPROVEN
    finding = finding_of(dropout("", "mode"), opset=20, inputs=(MODE,))
    assert (
        finding.why
        == "nothing in the graph decides its mode: it is the model's input 'mode': the caller"
        " decides"
    )
    assert "constant" in finding.fix


@pytest.mark.parametrize(("value", "verdict"), [(False, Verdict.FAIL), (True, Verdict.PASS)])
def test_a_mode_that_is_computed_from_constants_is_known(value: bool, verdict: Verdict) -> None:
    computed = helper.make_node("Not", ["n"], ["m"])
    assert (
        verdict_of(dropout("", "m"), opset=20, before=(computed,), constants={"n": value})
        is verdict
    )


def test_a_mode_that_is_computed_from_an_input_is_unproven() -> None:
    computed = helper.make_node("Not", ["mode"], ["m"])
    assert (
        verdict_of(dropout("", "m"), opset=20, before=(computed,), inputs=(MODE,))
        is Verdict.UNPROVEN
    )


def function(node: onnx.NodeProto, opset: int, *attributes: str) -> onnx.FunctionProto:
    return helper.make_function(
        "my", "f", ["x", "m"], ["y"], [node], [helper.make_opsetid("", opset)], attributes
    )


@pytest.mark.parametrize(("value", "verdict"), [(True, Verdict.FAIL), (False, Verdict.PASS)])
def test_a_mode_that_a_call_passes_to_its_function_is_known(value: bool, verdict: Verdict) -> None:
    call = helper.make_node("f", ["x", "on"], ["y"], domain="my", name="call")
    functions = (function(dropout("", "m"), 20),)
    assert verdict_of(call, opset=20, constants={"on": value}, functions=functions) is verdict


def test_a_mode_that_a_call_leaves_out_is_off() -> None:
    call = helper.make_node("f", ["x"], ["y"], domain="my")
    assert verdict_of(call, opset=20, functions=(function(dropout("", "m"), 20),)) is Verdict.PASS


@pytest.mark.parametrize(
    ("op", "name", "opset", "trains"),
    [
        ("Dropout", "is_test", 6, 0),
        ("BatchNormalization", "is_test", 6, 0),
        ("BatchNormalization", "training_mode", 15, 1),
    ],
)
def test_a_flag_that_a_call_passes_to_its_function_is_known_and_without_a_call_unproven(
    op: str, name: str, opset: int, trains: int
) -> None:
    node = helper.make_node(op, ["x"] * 5, ["y"], name="node")
    node.attribute.add(name=name, ref_attr_name="flag", type=onnx.AttributeProto.INT)
    functions = (function(node, opset, "flag"),)
    for flag in (0, 1):
        call = helper.make_node("f", ["x"], ["y"], domain="my", name="call", flag=flag)
        assert verdict_of(call, opset=20, functions=functions) is (
            Verdict.FAIL if flag == trains else Verdict.PASS
        )
    dead = finding_of(helper.make_node("Relu", ["x"], ["y"]), opset=20, functions=functions)
    assert str(dead).startswith(f"my:f/node ({op}-{opset}): its attribute {name} is not known here")
    assert (
        verdict_of(helper.make_node("Relu", ["x"], ["y"]), opset=20, functions=functions)
        is Verdict.UNPROVEN
    )


def test_a_finding_says_why_an_attribute_is_unknown() -> None:
    mistyped = helper.make_node("BatchNormalization", ["x"] * 5, ["y"], name="node")
    mistyped.attribute.append(helper.make_attribute("training_mode", 1.0))
    written = "it is not written as one integer, and programs read it differently"
    assert written in str(finding_of(mistyped, opset=15))
    refers = helper.make_node("BatchNormalization", ["x"] * 5, ["y"], name="node")
    refers.attribute.add(name="training_mode", ref_attr_name="flag", type=onnx.AttributeProto.INT)
    assert "there is no such call" in str(finding_of(refers, opset=15))
    functions = (function(refers, 15, "flag"),)
    call = helper.make_node("f", ["x"], ["y"], domain="my", name="call", flag=1.0)
    passed = "the call of its function does not pass 'flag' as one integer"
    assert passed in str(finding_of(call, opset=20, functions=functions))
    refers.attribute[0].i = 1
    assert written in str(finding_of(refers, opset=15))


@pytest.mark.parametrize(
    ("opset", "attributes", "outputs", "verdict"),
    [
        (1, {}, 1, Verdict.FAIL),
        (6, {}, 1, Verdict.FAIL),
        (6, {"is_test": 1}, 1, Verdict.PASS),
        (7, {}, 1, Verdict.PASS),
        (7, {}, 5, Verdict.FAIL),
        (9, {}, 1, Verdict.PASS),
        (9, {}, 2, Verdict.FAIL),
        (14, {}, 1, Verdict.PASS),
        (13, {}, 2, Verdict.FAIL),
        (14, {"training_mode": 1}, 1, Verdict.FAIL),
        (15, {}, 1, Verdict.PASS),
        (15, {"training_mode": 0}, 1, Verdict.PASS),
        (15, {"training_mode": 1}, 1, Verdict.FAIL),
    ],
)
def test_batch_normalization_is_checked_by_the_semantics_of_its_opset(
    opset: int, attributes: dict[str, int], outputs: int, verdict: Verdict
) -> None:
    assert verdict_of(batch_normalization(outputs, **attributes), opset=opset) is verdict


def test_batch_normalization_in_another_layout_is_checked_by_its_flag() -> None:
    for flag, verdict in ((0, Verdict.PASS), (1, Verdict.FAIL)):
        assert (
            verdict_of(batch_normalization(1, "com.ms.internal.nhwc", training_mode=flag), opset=20)
            is verdict
        )


@pytest.mark.parametrize(
    ("op", "index"), [("BitmaskDropout", 2), ("BiasDropout", 4), ("BitmaskBiasDropout", 4)]
)
def test_the_contributed_dropouts_are_checked_by_their_mode_input(op: str, index: int) -> None:
    def dropout_with(*last: str) -> onnx.NodeProto:
        return helper.make_node(
            op, ["x", *[""] * (index - len(last)), *last], ["y"], domain="com.microsoft"
        )

    assert verdict_of(dropout_with("m"), opset=20, constants=ON) is Verdict.FAIL
    assert verdict_of(dropout_with("m"), opset=20, constants=OFF) is Verdict.PASS
    assert verdict_of(dropout_with("mode"), opset=20, inputs=(MODE,)) is Verdict.UNPROVEN
    assert (
        verdict_of(dropout_with("r", "m"), opset=20, constants={"r": np.float32(0)} | ON)
        is Verdict.PASS
    )
    assert verdict_of(dropout_with(), opset=20) is Verdict.PASS


@pytest.mark.parametrize(
    ("domain", "op"),
    [
        *(
            ("com.microsoft", op)
            for op in (
                "DropoutGrad",
                "BitmaskDropoutGrad",
                "BiasSoftmaxDropout",
                "TrainableDropout",
            )
        ),
        *(
            ("com.microsoft", op)
            for op in ("BatchNormInternal", "LSTMTraining", "GRUTraining", "AdamWOptimizer")
        ),
        *(("ai.onnx.preview.training", op) for op in ("Gradient", "Adam", "Adagrad", "Momentum")),
    ],
)
def test_an_operator_only_for_training_fails(domain: str, op: str) -> None:
    assert verdict_of(helper.make_node(op, ["x"], ["y"], domain=domain), opset=20) is Verdict.FAIL


@pytest.mark.parametrize(
    "op", ["LSTM", "GRU", "RNN", "InstanceNormalization", "LayerNormalization"]
)
def test_an_operator_without_a_mode_passes(op: str) -> None:
    record = training_mode.check(
        Subject(graph=graph_of(model_of(helper.make_node(op, ["x"], ["y"]), opset=20)))
    )
    assert (record.verdict, record.measured) == (Verdict.PASS, "0 on, 0 undecided, of 0")


def test_an_operator_named_dropout_in_another_domain_passes() -> None:
    assert (
        verdict_of(
            helper.make_node("Dropout", ["x", "", "m"], ["y"], domain="my"), opset=20, constants=ON
        )
        is Verdict.PASS
    )
