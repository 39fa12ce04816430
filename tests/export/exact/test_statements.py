"""The statements of certificates and of `evalmode verify`, and products of bytes that saturate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from typer.testing import CliRunner

from evalmode import cli
from evalmode.bundle.certificate import Certificate, Statement
from evalmode.bundle.frontend import BpeSpec
from evalmode.bundle.store import open_bundle
from evalmode.export.exact.limits import Limits
from evalmode.export.exact.statements import statements_of
from evalmode.export.graph import graph_of
from tests.export.exact.small_exact_graphs import (
    LENGTH,
    VOCABULARY,
    ExactNetwork,
    model,
    node,
)

WRITTEN = Path(__file__).parents[2] / "bundle" / "written_by"
LIMITS = Limits(ranges={"ids": (0, VOCABULARY - 1)}, largest={"length": LENGTH})
FLAGS = [f"--range=ids=0:{VOCABULARY - 1}", f"--largest=length={LENGTH}"]


@pytest.fixture
def exact_file(tmp_path: Path) -> Path:
    onnx.save(ExactNetwork().model(), tmp_path / "exact.onnx")
    return tmp_path / "exact.onnx"


def verify(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["verify", *map(str, arguments)])
    return result.exit_code, result.output


def test_a_statement_says_proved_and_how_many_bits_were_needed() -> None:
    exact, saturation = statements_of(graph_of(ExactNetwork().model()), LIMITS)
    assert (exact.name, exact.holds, exact.why) == ("exact-arithmetic", True, "proved")
    assert "of 24 bits" in exact.measured
    assert "fit TF32's 11" in exact.measured
    assert (saturation.name, saturation.holds) == ("integer-saturation", True)


def test_a_statement_says_not_proved_and_where() -> None:
    exact, _ = statements_of(graph_of(ExactNetwork().model()))
    assert not exact.holds
    assert exact.why.startswith("not proved: at_embedded, its indices go from")
    assert exact.reasons[0].node == "at_embedded"


def test_verify_reports_a_statement_and_fails_for_it_only_if_told_to(exact_file: Path) -> None:
    code, output = verify(exact_file)
    assert code == 0
    assert "exact-arithmetic  not proved: at_embedded" in output
    code, output = verify(exact_file, "--require-exact")
    assert code == 1
    assert "error     exact-arithmetic  not proved" in output
    code, output = verify(exact_file, "--require-exact", *FLAGS)
    assert code == 0
    assert "exact-arithmetic  proved" in output


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("sarif", '"ruleId": "exact-arithmetic"'),
        ("junit", 'name="exact-arithmetic"'),
        ("github", "title=evalmode%3A exact-arithmetic"),
    ],
)
def test_reports_for_other_programs_show_a_statement_that_is_required(
    form: str, text: str, exact_file: Path
) -> None:
    assert text not in verify(exact_file, "--format", form)[1]
    assert text in verify(exact_file, "--format", form, "--require-exact")[1]
    assert text not in verify(exact_file, "--format", form, "--require-exact", *FLAGS)[1]


def test_the_json_report_has_the_statements(exact_file: Path) -> None:
    report = json.loads(verify(exact_file, "--format", "json", *FLAGS)[1])
    statements = report["files"][0]["statements"]
    assert [item["name"] for item in statements] == ["exact-arithmetic", "integer-saturation"]
    assert statements[0]["why"] == "proved"


@pytest.mark.parametrize(
    "flag",
    [
        "--range=ids=5:1",
        "--range=ids=5",
        "--range=5:6",
        "--range=x=0:0.5",
        "--range=x=0:1/0.3",
        "--range=x=0:1/0",
        "--range=x=0:1/2^-999999999",
        "--range=x=0:1/3^2",
        "--range=x=0:nan/1",
        "--largest=length",
        "--largest=n=0",
    ],
)
def test_a_limit_that_is_written_otherwise_is_refused(flag: str, exact_file: Path) -> None:
    result = CliRunner().invoke(cli.app, ["verify", str(exact_file), flag])
    assert result.exit_code != 0
    assert "must be" in str(result.exception)


@pytest.mark.parametrize(
    ("flag", "largest"),
    [
        ("x=0:1/2^-8", "1"),
        ("x=0:1/0.00390625", "1"),
        ("x=0:255/1", "255"),
        ("x=0.1:0.9/0.25", "0.75"),
        ("x=-0.5:-0.25/0.25", "-0.25"),
    ],
)
def test_a_range_with_a_step_is_for_a_float_input(flag: str, largest: str, tmp_path: Path) -> None:
    proto = model(
        [node("Sub", ["x", "c"], "gap"), node("Abs", ["gap"])],
        inputs={"x": (TensorProto.FLOAT, [4])},
        constants={"c": np.float32(float(largest) + 1)},
    )
    onnx.save(proto, tmp_path / "float.onnx")
    assert verify(tmp_path / "float.onnx", "--require-exact")[0] == 1
    code, output = verify(tmp_path / "float.onnx", "--require-exact", f"--range={flag}")
    assert code == 0, output


def test_a_bundle_is_proved_within_the_limits_of_its_manifest() -> None:
    code, output = verify(WRITTEN / "certificate_2" / "counted" / "1", "--require-exact")
    assert code == 0, output
    certificate = open_bundle(WRITTEN / "certificate_2" / "counted" / "1").certificate
    assert certificate is not None
    statement = certificate.statement("exact-arithmetic")
    assert statement is not None
    assert statement.holds
    assert certificate.statement("another") is None
    assert verify(WRITTEN / "schema_1" / "small" / "1", "--require-exact")[0] == 1


def test_a_flag_does_not_replace_what_the_manifest_of_a_bundle_says() -> None:
    # Its ids go from -4 to 3, which the service enforces.
    bundle = WRITTEN / "certificate_2" / "counted" / "1"
    assert verify(bundle, "--require-exact", "--range=ids=0:100")[0] == 0
    onnx_file = bundle / "model.onnx"
    assert verify(onnx_file, "--require-exact", "--range=ids=-4:3")[0] == 0
    assert verify(onnx_file, "--require-exact", "--range=ids=0:100")[0] == 1


def test_the_limits_of_a_front_end_are_those_of_its_ids_and_its_mask() -> None:
    manifest = open_bundle(WRITTEN / "schema_1" / "classifier" / "1").manifest
    ids = manifest.inputs[0].model_copy(update={"name": "input_ids"})
    mask = manifest.inputs[0].model_copy(update={"name": "attention_mask"})
    manifest = manifest.model_copy(
        update={
            "frontend": BpeSpec(vocabulary=500, lengths=(4, 8)),
            "inputs": (ids, mask),
        }
    )
    limits = Limits.of(manifest)
    assert limits.ranges == {"input_ids": (0, 499), "attention_mask": (0, 1)}
    assert limits.largest == {"input_ids:1": 8, "attention_mask:1": 8}


def test_schema_version_1_of_a_certificate_has_no_statements() -> None:
    certificate = open_bundle(WRITTEN / "certificate_2" / "counted" / "1").certificate
    assert certificate is not None
    assert certificate.seal_holds
    content = certificate.model_dump(mode="json") | {"schema_version": 1}
    with pytest.raises(ValueError, match="schema_version 1 has no statements: use 2"):
        Certificate.model_validate(content)


def saturation_of(weights: Any, *, first: int = 255, to: int = TensorProto.UINT8) -> Statement:
    """The statement about a product of bytes from 0 (or -`first`) to `first`."""
    proto = model(
        [
            node("Cast", ["ids"], "bytes", to=to),
            node("MatMulInteger", ["bytes", "w"], "sums"),
            node("Cast", ["sums"], to=TensorProto.FLOAT),
        ],
        inputs={"ids": (TensorProto.INT64, ["n", len(weights)])},
        constants={"w": weights},
    )
    return statements_of(graph_of(proto), Limits(ranges={"ids": (0, first)}))[1]


def test_two_products_of_bytes_beyond_16_bits_may_saturate() -> None:
    assert saturation_of(np.int8([[64], [64]])).holds
    statement = saturation_of(np.int8([[64], [65]]))
    assert not statement.holds
    assert statement.why.startswith("may saturate: at_sums, a sum of two products of bytes may")
    assert "32,895" in statement.why
    assert statement.measured == "1 of 1 products of bytes"
    assert not saturation_of(np.int8([[-65], [0], [-65]])).holds
    assert saturation_of(np.int8([[127], [-128]])).holds
    assert saturation_of(np.int8([[127], [127]]), first=129).holds
    assert saturation_of(np.uint8([[255], [255]])).holds


def test_a_signed_left_operand_is_made_unsigned_first() -> None:
    assert saturation_of(np.int8([[64], [64]]), first=127, to=TensorProto.INT8).holds
    assert not saturation_of(np.int8([[127], [4]]), first=127, to=TensorProto.INT8).holds


def test_products_of_a_runtimes_own_operators_count() -> None:
    proto = model(
        [node("QGemm", ["x", "s", "z", "w", "s", "z"], domain="com.microsoft")],
        inputs={"x": (TensorProto.UINT8, [1, 2])},
        constants={"w": np.int8([[127], [127]]), "s": np.float32(1), "z": np.uint8(0)},
    )
    statement = statements_of(graph_of(proto))[1]
    assert statement.reasons[0].op == "com.microsoft::QGemm"


@pytest.mark.parametrize("before", ["", "DequantizeLinear", "QuantizeLinear"])
def test_dequantised_weights_beside_bytes_are_a_product_of_bytes(before: str) -> None:
    # ONNX Runtime makes MatMulIntegerToFloat and QLinearMatMul of them.
    nodes = [
        node("DequantizeLinear", ["w", "scale"], "matrix"),
        node("MatMul", ["left", "matrix"]),
    ]
    kind = TensorProto.UINT8 if before == "DequantizeLinear" else TensorProto.FLOAT
    nodes.insert(0, node(before or "Identity", ["x"] if not before else ["x", "scale"], "left"))
    proto = model(
        nodes,
        inputs={"x": (kind, ["n", 2])},
        constants={"w": np.int8([[127], [127]]), "scale": np.float32(0.25)},
    )
    assert statements_of(graph_of(proto))[1].holds == (before == "")
