from __future__ import annotations

import pytest
from pydantic import ValidationError

from evalmode.bundle.frontend import BpeSpec
from evalmode.bundle.manifest import (
    Bound,
    Manifest,
    PartOfAxis,
    TensorSpec,
    lowest_schema_version,
)

SHA = "0f" * 32
FIELDS = {
    "name": "any",
    "version": "1.0-rc1",
    "opset": 18,
    "inputs": (TensorSpec(name="input_ids", datatype="INT64", shape=(-1, -1)),),
    "outputs": (TensorSpec(name="logits", datatype="FP32", shape=(-1, 3)),),
    "files": {"model.onnx": SHA},
}


def test_a_manifest_has_one_json_form_that_reads_back_as_itself():
    manifest = Manifest(
        **FIELDS, metrics={"accuracy": 0.1}, provenance={"seed": 0, "note": "rövid"}
    )
    read = Manifest.model_validate_json(manifest.canonical())
    assert read == manifest
    assert read.canonical() == manifest.canonical()
    assert manifest.canonical().endswith(b"}\n")
    assert "rövid".encode() in manifest.canonical()


def test_front_end_and_labels_are_optional():
    manifest = Manifest(**FIELDS)
    assert (manifest.frontend, manifest.labels) == (None, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", ".."),
        ("name", "a/b"),
        ("name", ".hidden"),
        ("name", "a" * 65),
        ("name", "a\n"),
        ("version", "1/../.."),
        ("version", ""),
        ("inputs", ()),
        ("outputs", ()),
        ("schema_version", 3),
        ("schema_version", 0),
        ("unknown", 1),
        ("files", {"model.onnx": "0F" * 32}),
        ("files", {"model.onnx": "0f" * 31}),
        ("files", {"model.onnx": SHA, "../out": SHA}),
        ("files", {"model.onnx": SHA, "/etc/passwd": SHA}),
        ("files", {"model.onnx": SHA, "a\n": SHA}),
        ("files", {"other.onnx": SHA}),
        ("files", {}),
    ],
)
def test_an_invalid_value_is_refused_with_the_name_of_the_field(field, value):
    with pytest.raises(ValidationError, match=field):
        Manifest(**{**FIELDS, field: value})


IDS = TensorSpec(
    name="ids",
    datatype="INT32",
    shape=(-1, 2),
    bounds=(
        Bound(minimum=0, maximum=9),
        Bound(minimum=3, part=(PartOfAxis(axis=1, start=0, stop=1),)),
    ),
)


def test_bounds_need_the_second_version_of_the_schema():
    manifest = Manifest(**{**FIELDS, "inputs": (IDS,)})
    assert Manifest.model_validate_json(manifest.canonical()) == manifest
    assert lowest_schema_version(manifest.inputs) == 2
    assert lowest_schema_version(manifest.outputs) == 1
    with pytest.raises(ValidationError, match="schema_version 1 has no bounds"):
        Manifest(**{**FIELDS, "inputs": (IDS,), "schema_version": 1})


def test_a_manifest_without_bounds_has_no_key_for_them():
    manifest = Manifest(**FIELDS, schema_version=1)
    assert b"bounds" not in manifest.canonical()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"datatype": "FP32"}, "bounds are for integers, and ids is FP32"),
        ({"shape": (-1,)}, "bounds name axis 1 of ids, which has 1"),
        ({"bounds": ({"minimum": 3, "maximum": 2},)}, "no value is at least 3 and at most 2"),
    ],
)
def test_invalid_bounds_are_refused_with_the_reason(change, reason):
    with pytest.raises(ValidationError, match=reason):
        TensorSpec.model_validate({**IDS.model_dump(), **change})


def test_a_front_end_with_a_tokenizer_lists_its_file():
    spec = BpeSpec(vocabulary=300)
    with pytest.raises(ValidationError, match=r"files must list tokenizer\.json"):
        Manifest(**FIELDS, frontend=spec)
    files = {"model.onnx": SHA, "tokenizer.json": SHA}
    assert Manifest(**{**FIELDS, "files": files}, frontend=spec).frontend == spec


def test_a_manifest_is_immutable():
    with pytest.raises(ValidationError):
        Manifest(**FIELDS).name = "other"
