from __future__ import annotations

import onnx
import onnx.defs
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from evalmode.bundle.certificate import Record, Severity, Verdict
from evalmode.export.graph import graph_of
from evalmode.export.rules import opaque_op, stochastic_op, training_mode
from evalmode.export.rules.subject import Subject

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
DOMAINS = ("my", "com.microsoft", "ai.onnx.ml", "ai.onnx.preview.training", "org.pytorch.aten")
COMPILED = {("com.microsoft", "EPContext"), ("com.microsoft", "Snpe")}
# Operators that TensorRT and ROCm builds register in the domain of ONNX for their own use.
PLUGINS = {
    ("", f"{name}_TRT")
    for name in (
        "DisentangledAttention",
        "EfficientNMS",
        "MultilevelCropAndResize",
        "PyramidROIAlign",
    )
}


def record_of(
    op: str,
    domain: str = "",
    *,
    opset: int = 20,
    functions: tuple[onnx.FunctionProto, ...] = (),
    imported: bool = True,
) -> Record:
    node = helper.make_node(op, ["x"], ["y"], name="n", domain=domain)
    graph = helper.make_graph([node], "main", [X], [Y])
    opsets = [helper.make_opsetid("", opset)] if imported else []
    opsets += [helper.make_opsetid(name, 1) for name in DOMAINS]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions)
    return opaque_op.check(Subject(graph=graph_of(model)))


@pytest.mark.parametrize(
    ("domain", "op"),
    [
        ("my", "Relu"),
        ("my", "Dropout"),
        ("org.pytorch.aten", "ATen"),
        ("com.microsoft", "PythonOp"),
        ("com.microsoft", "NoSuchOperator"),
        ("com.microsoft", "EPContext"),
        ("", "NoSuchOperator"),
        ("ai.onnx.ml", "NoSuchOperator"),
        ("ai.onnx.preview.training", "NoSuchOperator"),
        ("com.microsoft.extensions", "Tokenizer"),
    ],
)
def test_an_unknown_operator_is_unproven_and_is_named(domain: str, op: str) -> None:
    record = record_of(op, domain)
    assert record.verdict is Verdict.UNPROVEN
    (finding,) = record.findings
    qualified_name = f"{domain}::{op}" if domain else op
    assert (finding.node, finding.op, finding.severity) == ("n", qualified_name, Severity.UNPROVEN)
    assert finding.why.startswith(f"{qualified_name} cannot be shown to be free of randomness: ")
    assert finding.fix
    is_foreign = domain in ("my", "org.pytorch.aten", "com.microsoft", "com.microsoft.extensions")
    assert finding.why.endswith("nor a function of the model") is is_foreign


@pytest.mark.parametrize(
    ("domain", "op"),
    [
        *(
            ("", "Relu"),
            ("ai.onnx", "Relu"),
            ("", "RandomUniformLike"),
            ("", "Dropout"),
            ("", "LayerNormalization"),
        ),
        *(
            ("", "SimplifiedLayerNormalization"),
            ("ai.onnx.ml", "Scaler"),
            ("ai.onnx.preview.training", "Adam"),
        ),
        *(
            ("com.microsoft", op)
            for op in ("FusedMatMul", "Sampling", "BiasDropout", "QAttention", "DropoutGrad")
        ),
    ],
)
def test_a_known_operator_or_one_of_another_rule_passes(domain: str, op: str) -> None:
    assert record_of(op, domain).verdict is Verdict.PASS


def test_a_function_of_the_model_is_checked_by_its_nodes() -> None:
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("other", 1)]
    for inner, verdict in (("", Verdict.PASS), ("other", Verdict.UNPROVEN)):
        node = helper.make_node("Identity", ["x"], ["y"], name="inner", domain=inner)
        function = helper.make_function("my", "Dropout", ["x"], ["y"], [node], opsets)
        record = record_of("Dropout", "my", functions=(function,))
        assert record.verdict is verdict
        assert [finding.node for finding in record.findings] == ["n/my:Dropout/inner"] * bool(inner)


@pytest.mark.parametrize(
    ("op", "opset", "why"),
    [
        ("Gelu", 19, "opset 19 has no such operator"),
        ("Upsample", 10, "opset 10 deprecates it"),
        (
            "Relu",
            9999,
            f"opset 9999 of ai.onnx is newer than onnx {onnx.__version__}, which knows ",
        ),
    ],
)
def test_an_operator_that_its_opset_lacks_is_unproven(op: str, opset: int, why: str) -> None:
    (finding,) = record_of(op, opset=opset).findings
    assert why in finding.why


def test_an_opset_that_is_not_imported_is_unproven() -> None:
    (finding,) = record_of("Relu", imported=False).findings
    assert finding.why.endswith("no opset of its domain is imported")


def test_every_operator_without_a_declared_determinism_was_reviewed() -> None:
    unknown = onnx.defs.OpSchema.NodeDeterminism.Unknown
    silent = {
        (schema.domain, schema.name, schema.since_version)
        for schema in onnx.defs.get_all_schemas_with_history()
        if schema.node_determinism == unknown  # type: ignore[attr-defined]
    }
    assert silent, "onnx has such schemas"
    for domain, op, opset in silent:
        assert not [
            finding
            for finding in record_of(op, domain, opset=opset).findings
            if "onnx itself" in finding.why
        ]


def test_every_operator_of_onnx_is_known_at_its_opset_unless_it_is_deprecated() -> None:
    for schema in onnx.defs.get_all_schemas_with_history():
        verdict = record_of(
            schema.name, schema.domain, opset=schema.since_version if schema.domain == "" else 20
        ).verdict
        if schema.domain in ("", "ai.onnx.preview.training"):
            assert verdict is (Verdict.UNPROVEN if schema.deprecated else Verdict.PASS), schema.name


def test_every_operator_of_the_runtime_was_reviewed() -> None:
    """If this fails: check whether a new operator draws or trains, then add it to a list."""
    registered = {(schema.domain, schema.name) for schema in runtime.get_all_operator_schema()}
    onnx_operators = {
        (schema.domain, schema.name) for schema in onnx.defs.get_all_schemas_with_history()
    }
    reviewed = opaque_op._KNOWN | set(stochastic_op.drawing_operators())
    assert registered - onnx_operators - reviewed == COMPILED | PLUGINS


def test_no_operator_of_another_rule_is_listed_as_quiet() -> None:
    quiet = {("com.microsoft", op) for op in opaque_op._CONTRIB.split()}
    assert not quiet & (stochastic_op.drawing_operators() | training_mode.JUDGED)
