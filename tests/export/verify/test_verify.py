"""`verify` answers for any file with records or with one sentence, and never with a traceback."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evalmode.bundle.certificate import Severity, Verdict
from evalmode.bundle.known_answers import KnownAnswer, pack
from evalmode.bundle.manifest import KNOWN_ANSWERS_FILE, MODEL_FILE
from evalmode.bundle.store import digest_of, hashes_of, open_bundle, write_bundle
from evalmode.export.graph import ModelUnreadable
from evalmode.export.release import Released
from evalmode.export.rules.registry import RULES, Needs
from evalmode.export.verify.options import Options
from evalmode.export.verify.verify import Verified, verify

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
MY_OPSET = [helper.make_opsetid("my", 1)]


def model_of(
    *nodes: onnx.NodeProto,
    constants: tuple[onnx.TensorProto, ...] = (),
    functions: tuple[onnx.FunctionProto, ...] = (),
    opset: int = 20,
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "main", [X], [Y], constants)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset), *MY_OPSET], functions=functions
    )


def verify_model(model: onnx.ModelProto | bytes, folder: Path) -> Verified:
    path = folder / "any.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return verify(path)


def verdicts(result: Verified) -> dict[str, Verdict]:
    """The verdict by rule, without the rules that do not apply."""
    applied = [
        record for record in result.all_records if record.verdict is not Verdict.NOT_APPLICABLE
    ]
    return {record.rule: record.verdict for record in applied}


def rewrite_bundle(released: Released, root: Path, **replacements: bytes) -> Path:
    """The bundle with some files exchanged, every hash and its certificate made anew: whole, and
    unchecked.
    """
    bundle = open_bundle(released.path)
    files = {"model": MODEL_FILE, "known_answers": KNOWN_ANSWERS_FILE}
    contents = {**bundle.contents, **{files[name]: data for name, data in replacements.items()}}
    manifest = bundle.manifest.model_copy(update={"files": hashes_of(contents)})
    certificate = released.certificate.model_copy(update={"digest": digest_of(manifest)})
    return write_bundle(root, manifest=manifest, certificate=certificate, contents=contents).path


def test_a_bundle_has_the_records_of_its_certificate_and_those_of_new_checks(
    released: Released,
) -> None:
    result = verify(released.path)
    assert result.verdict is Verdict.PASS
    assert result.file == released.path / MODEL_FILE
    rules = [record.rule for record in (*result.certified, *result.records)]
    assert len(rules) == len(set(rules)), "a rule that ran again is listed once"
    assert set(rules) == {record.rule for record in released.certificate.records} | {
        "expectation-gap",
        "known-answers",
    }
    assert result.records[-1].why == "the known answers come out bitwise"
    assert result.records[-1].measured == "8 answers, 0.00e+00 standard deviations"


def test_a_folder_above_a_bundle_is_verified_as_the_bundle(released: Released) -> None:
    assert verify(released.path.parent.parent).path == released.path


def test_a_known_answer_that_is_not_reproduced_is_a_failed_record(
    released: Released, tmp_path: Path
) -> None:
    answers = open_bundle(released.path).known_answers()
    wrong = {name: tensor + np.float32(1) for name, tensor in answers[2].outputs.items()}
    replacements = (
        *answers[:2],
        KnownAnswer(inputs=answers[2].inputs, outputs=wrong, text=answers[2].text),
        *answers[3:],
    )
    result = verify(rewrite_bundle(released, tmp_path, known_answers=pack(replacements)))
    assert result.verdict is Verdict.FAIL
    assert {rule for rule, verdict in verdicts(result).items() if verdict is Verdict.FAIL} == {
        "known-answers"
    }
    assert verdicts(result)["known-answers"] is Verdict.FAIL
    assert result.records[-1].why.startswith(
        "known answer 2 is not reproduced: output 'logits' differs by"
    )


def test_a_graph_that_draws_fails_whatever_its_certificate_says(
    released: Released, tmp_path: Path
) -> None:
    model = onnx.load_model_from_string(open_bundle(released.path).model)
    model.graph.node.append(
        helper.make_node("RandomUniform", [], ["noise"], name="draw", shape=[1])
    )
    result = verify(rewrite_bundle(released, tmp_path, model=model.SerializeToString()))
    assert verdicts(result)["stochastic-op"] is Verdict.FAIL
    assert result.verdict is Verdict.FAIL


def test_a_bare_file_is_verified_by_the_rules_on_graphs_and_names_the_others(
    tmp_path: Path,
) -> None:
    result = verify_model(model_of(helper.make_node("Relu", ["x"], ["y"])), tmp_path)
    assert verdicts(result) == dict.fromkeys(
        (rule.name for rule in RULES if rule.needs is Needs.GRAPH), Verdict.PASS
    )
    assert result.verdict is Verdict.PASS
    assert [record.rule for record in result.records] == [rule.name for rule in RULES]
    reasons = {
        record.rule: record.why
        for record in result.records
        if record.verdict is Verdict.NOT_APPLICABLE
    }
    assert reasons["parity"] == "it needs the module itself, which `evalmode export` has"
    assert (
        reasons["repeatability"] == "it needs inputs to run the graph on: give them with --inputs"
    )
    assert reasons["known-answers"] == "it needs a bundle's known answers"


def test_a_nan_weight_is_found_in_a_bare_file(
    tmp_path: Path,
) -> None:
    nan = numpy_helper.from_array(np.asarray([1, np.nan], np.float32), "w")
    result = verify_model(
        model_of(helper.make_node("Add", ["x", "w"], ["y"]), constants=(nan,)), tmp_path
    )
    assert result.verdict is Verdict.FAIL
    (record,) = [record for record in result.records if record.rule == "non-finite"]
    assert (record.verdict, record.why) == (Verdict.FAIL, "the graph alone shows it")
    assert [finding.node for finding in record.findings] == ["w"]


def test_a_weight_like_a_mask_is_a_warning_of_a_rule_that_does_not_apply(
    tmp_path: Path,
) -> None:
    keeps = np.random.default_rng(0).random(5000) < 0.8
    mask = numpy_helper.from_array(keeps.astype(np.float32) / np.float32(0.8), "mask")
    result = verify_model(
        model_of(helper.make_node("Mul", ["x", "mask"], ["y"]), constants=(mask,)), tmp_path
    )
    assert result.verdict is Verdict.PASS
    (record,) = [record for record in result.records if record.rule == "baked-noise"]
    assert record.verdict is Verdict.NOT_APPLICABLE
    assert [(finding.severity, finding.node) for finding in record.findings] == [
        (Severity.WARNING, "mask")
    ]


def test_an_excluded_rule_has_no_record_and_is_named(released: Released, tmp_path: Path) -> None:
    (tmp_path / "draw.onnx").write_bytes(
        model_of(helper.make_node("Bernoulli", ["x"], ["y"])).SerializeToString()
    )
    file = verify(tmp_path / "draw.onnx", Options(excluded=["stochastic-op"]))
    assert file.verdict is Verdict.PASS
    assert "stochastic-op" not in verdicts(file)
    assert file.excluded == ("stochastic-op",)
    bundle = verify(released.path, Options(excluded=["known-answers", "parity"]))
    assert bundle.excluded == ("parity", "known-answers")
    assert not {"parity", "known-answers"} & {record.rule for record in bundle.all_records}


def test_a_file_without_any_applied_rule_is_unproven(tmp_path: Path) -> None:
    (tmp_path / "any.onnx").write_bytes(
        model_of(helper.make_node("Relu", ["x"], ["y"])).SerializeToString()
    )
    result = verify(tmp_path / "any.onnx", Options(excluded=[rule.name for rule in RULES]))
    assert result.records == ()
    assert result.verdict is Verdict.UNPROVEN


def dropout(**attributes: object) -> onnx.NodeProto:
    return helper.make_node("Dropout", ["x", "", "m"], ["y"], name="drop", **attributes)


def external_tensor() -> onnx.TensorProto:
    tensor = TensorProto(
        name="m", data_type=TensorProto.BOOL, dims=[1], data_location=TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value="weights.bin")
    return tensor


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        (external_tensor(), "'weights.bin', which does not exist"),
        (
            TensorProto(name="m", data_type=TensorProto.FLOAT, dims=[4], raw_data=b"abc"),
            "has 3 bytes",
        ),
        (TensorProto(name="m"), "has element type 0"),
    ],
    ids=["in a file that is absent", "malformed", "without a type"],
)
def test_an_unreadable_mode_is_one_sentence_that_names_the_tensor(
    mode: onnx.TensorProto, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(
        ModelUnreadable, match=rf"any\.onnx is not a valid ONNX model: the tensor 'm'.*{reason}"
    ):
        verify_model(model_of(dropout(), constants=(mode,)), tmp_path)


def test_a_constant_without_an_output_is_ignored(tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], [], value=numpy_helper.from_array(np.asarray(True)))
    result = verify_model(model_of(constant, helper.make_node("Dropout", ["x"], ["y"])), tmp_path)
    assert result.verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("op", "inputs", "attribute", "opset", "trains"),
    [
        ("Dropout", 1, "is_test", 6, 0),
        ("BatchNormalization", 5, "is_test", 6, 0),
        ("BatchNormalization", 5, "training_mode", 15, 1),
    ],
)
def test_a_flag_that_a_call_sets_is_checked_at_each_call(
    op: str, inputs: int, attribute: str, opset: int, trains: int, tmp_path: Path
) -> None:
    node = helper.make_node(op, ["x"] * inputs, ["y"], name="node")
    node.attribute.add(name=attribute, ref_attr_name="flag", type=onnx.AttributeProto.INT)
    imports = [helper.make_opsetid("", opset)]
    function = helper.make_function("my", "f", ["x"], ["y"], [node], imports, attributes=["flag"])
    for flag in (0, 1):
        call = helper.make_node("f", ["x"], ["y"], domain="my", name="call", flag=flag)
        result = verify_model(model_of(call, functions=(function,)), tmp_path)
        (record,) = [record for record in result.records if record.rule == "training-mode"]
        assert record.verdict is (Verdict.FAIL if flag == trains else Verdict.PASS)
        assert [finding.op for finding in record.findings] == [f"{op}-{opset}"] * (flag == trains)


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
def test_a_file_without_a_model_is_one_sentence_that_names_the_file(
    data: bytes, tmp_path: Path
) -> None:
    with pytest.raises(ModelUnreadable, match=r"any\.onnx is not an ONNX model: "):
        verify_model(data, tmp_path)


def test_an_absent_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadable, match=r"absent\.onnx cannot be read: No such file"):
        verify(tmp_path / "absent.onnx")


def test_a_file_with_any_one_byte_changed_is_verified_or_unreadable(tmp_path: Path) -> None:
    constant = helper.make_node(
        "Constant", [], ["m"], value=numpy_helper.from_array(np.asarray(True))
    )
    half = numpy_helper.from_array(np.float32(0.5), "r")
    model = model_of(
        constant, helper.make_node("Dropout", ["x", "r", "m"], ["y"], name="d"), constants=(half,)
    )
    data, draw = model.SerializeToString(), random.Random(0)
    readable = 0
    for _ in range(600):
        changed_data = bytearray(data)
        changed_data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            readable += isinstance(verify_model(bytes(changed_data), tmp_path), Verified)
        except ModelUnreadable:
            continue
    assert 100 < readable < 500, "some files are readable and some are not"
