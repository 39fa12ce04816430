"""`evalmode verify` judges files from anywhere: it answers with records or with one sentence, and never breaks."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evalmode.bundle.certificate import Verdict
from evalmode.bundle.known_answers import KnownAnswer, pack
from evalmode.bundle.manifest import KNOWN_ANSWERS_FILE, MODEL_FILE
from evalmode.bundle.store import digest_of, hashes_of, open_bundle, write_bundle
from evalmode.export.graph import ModelUnreadable
from evalmode.export.release import Released
from evalmode.export.verify import KNOWN_ANSWERS, Verified, verify

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
OWN = [helper.make_opsetid("my", 1)]


def model_of(
    *nodes: onnx.NodeProto,
    constants: tuple[onnx.TensorProto, ...] = (),
    functions: tuple[onnx.FunctionProto, ...] = (),
    opset: int = 20,
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "main", [X], [Y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), *OWN], functions=functions)


def verified(model: onnx.ModelProto | bytes, folder: Path) -> Verified:
    path = folder / "any.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return verify(path)


def verdicts(found: Verified) -> dict[str, Verdict]:
    return {record.rule: record.verdict for record in (*found.records, *found.certified)}


def rewritten(released: Released, root: Path, **changed: bytes) -> Path:
    """The bundle with some files exchanged, every hash and its certificate made anew: whole, and unchecked."""
    bundle = open_bundle(released.path)
    files = {"model": MODEL_FILE, "known_answers": KNOWN_ANSWERS_FILE}
    contents = {**bundle.contents, **{files[name]: data for name, data in changed.items()}}
    manifest = bundle.manifest.model_copy(update={"files": hashes_of(contents)})
    certificate = released.certificate.model_copy(update={"digest": digest_of(manifest)})
    return write_bundle(root, manifest=manifest, certificate=certificate, contents=contents)


def test_a_bundle_is_verified_by_its_certificate_and_by_what_is_seen_anew(released: Released) -> None:
    found = verify(released.path)
    assert found.passed
    rules = [record.rule for record in (*found.certified, *found.records)]
    assert len(rules) == len(set(rules)), "a rule that ran again stands once"
    assert set(rules) == {record.rule for record in released.certificate.records} | {KNOWN_ANSWERS}
    assert found.records[-1].why == "the known answers come out bitwise"
    assert found.records[-1].measured == "8 answers, 0.00e+00 standard deviations"


def test_a_folder_above_a_bundle_means_the_bundle(released: Released) -> None:
    assert verify(released.path.parent.parent).path == released.path


def test_a_known_answer_that_does_not_come_out_is_a_failed_record(released: Released, tmp_path: Path) -> None:
    answers = open_bundle(released.path).known_answers()
    wrong = {name: tensor + np.float32(1) for name, tensor in answers[2].outputs.items()}
    changed = (*answers[:2], KnownAnswer(inputs=answers[2].inputs, outputs=wrong, text=answers[2].text), *answers[3:])
    found = verify(rewritten(released, tmp_path, known_answers=pack(changed)))
    assert not found.passed
    assert {rule for rule, verdict in verdicts(found).items() if verdict is not Verdict.PASS} == {KNOWN_ANSWERS}
    assert verdicts(found)[KNOWN_ANSWERS] is Verdict.FAIL
    assert found.records[-1].why.startswith("known answer 2 does not come out: output 'logits' differs by")


def test_a_graph_that_draws_fails_whatever_its_certificate_says(released: Released, tmp_path: Path) -> None:
    model = onnx.load_model_from_string(open_bundle(released.path).model)
    model.graph.node.append(helper.make_node("RandomUniform", [], ["noise"], name="draw", shape=[1]))
    found = verify(rewritten(released, tmp_path, model=model.SerializeToString()))
    assert verdicts(found)["stochastic-op"] is Verdict.FAIL
    assert not found.passed


def test_a_bare_file_is_judged_by_its_structure_alone(tmp_path: Path) -> None:
    found = verified(model_of(helper.make_node("Relu", ["x"], ["y"])), tmp_path)
    assert verdicts(found) == {"stochastic-op": Verdict.PASS, "training-mode": Verdict.PASS}
    assert found.passed


def dropout(**attributes: object) -> onnx.NodeProto:
    return helper.make_node("Dropout", ["x", "", "m"], ["y"], name="drop", **attributes)


def outside() -> onnx.TensorProto:
    tensor = TensorProto(name="m", data_type=TensorProto.BOOL, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="weights.bin")
    return tensor


@pytest.mark.parametrize(
    "mode",
    [outside(), TensorProto(name="m", data_type=TensorProto.FLOAT, dims=[4], raw_data=b"abc"), TensorProto(name="m")],
    ids=["in a file that is absent", "malformed", "without a type"],
)
def test_a_mode_that_cannot_be_read_is_unproven(mode: onnx.TensorProto, tmp_path: Path) -> None:
    found = verified(model_of(dropout(), constants=(mode,)), tmp_path)
    assert verdicts(found)["training-mode"] is Verdict.UNPROVEN
    assert not found.passed


def test_a_constant_without_an_output_is_passed_over(tmp_path: Path) -> None:
    nowhere = helper.make_node("Constant", [], [], value=numpy_helper.from_array(np.asarray(True)))
    found = verified(model_of(nowhere, helper.make_node("Dropout", ["x"], ["y"])), tmp_path)
    assert found.passed


@pytest.mark.parametrize(
    ("op", "inputs", "attribute", "opset"),
    [
        ("Dropout", 1, "is_test", 6),
        ("BatchNormalization", 5, "is_test", 6),
        ("BatchNormalization", 5, "training_mode", 15),
    ],
)
def test_a_flag_that_a_functions_caller_decides_is_unproven(
    op: str, inputs: int, attribute: str, opset: int, tmp_path: Path
) -> None:
    node = helper.make_node(op, ["x"] * inputs, ["y"], name="node")
    node.attribute.add(name=attribute, ref_attr_name="flag", type=onnx.AttributeProto.INT)
    imports = [helper.make_opsetid("", opset)]
    function = helper.make_function("my", "f", ["x"], ["y"], [node], imports, attributes=["flag"])
    call = helper.make_node("f", ["x"], ["y"], domain="my", flag=1)
    found = verified(model_of(call, functions=(function,)), tmp_path)
    (record,) = [record for record in found.records if record.rule == "training-mode"]
    assert record.verdict is Verdict.UNPROVEN
    assert record.where == (f"my:f/node ({op}-{opset})",)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        bytes(3000),
        model_of(dropout(), opset=2**40).SerializeToString(),
        onnx.ModelProto().SerializeToString(),
    ],
    ids=["empty", "text", "zeros", "wild opset", "no graph"],
)
def test_what_holds_no_model_is_one_sentence_that_names_the_file(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadable, match=r"any\.onnx is not an ONNX model: "):
        verified(data, tmp_path)


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadable, match=r"absent\.onnx cannot be read: No such file"):
        verify(tmp_path / "absent.onnx")


def test_a_file_with_any_one_byte_changed_is_verified_or_unreadable(tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["m"], value=numpy_helper.from_array(np.asarray(True)))
    half = numpy_helper.from_array(np.float32(0.5), "r")
    whole = model_of(constant, helper.make_node("Dropout", ["x", "r", "m"], ["y"], name="d"), constants=(half,))
    data, draw = whole.SerializeToString(), random.Random(0)
    readable = 0
    for _ in range(600):
        changed = bytearray(data)
        changed[draw.randrange(len(data))] = draw.randrange(256)
        try:
            readable += isinstance(verified(bytes(changed), tmp_path), Verified)
        except ModelUnreadable:
            continue
    assert 100 < readable < 500, "both ends were met"
