"""Models of tensors, opened from real bundles. The tests run their rows without an engine."""

from __future__ import annotations

import math

import numpy as np
import pytest
from onnx import TensorProto, helper

from evalmode.bundle.errors import BundleError
from evalmode.bundle.manifest import Bound, PartOfAxis, TensorSpec
from evalmode.service.errors import BadRequest
from evalmode.service.models.model import Model
from evalmode.service.models.tensors import ModelRow, check_inputs
from tests.service.bundles import onnx_model, tensor_bundle
from tests.service.by_hand import answer_alone, floats, random_inputs


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    return Model.open(tensor_bundle(tmp_path_factory.mktemp("tensors")))


def test_a_model_of_tensors_refuses_texts(tensors):
    with pytest.raises(BadRequest, match="takes tensors and no texts"):
        tensors.text_rows(["a"])


def test_rows_that_were_proven_independent_are_batched_by_their_shape(tensors):
    assert not tensors.is_text
    assert [bucket.label for bucket in tensors.buckets] == ["4", "other"]
    assert 1 in tensors.row_counts["4"]
    assert len(tensors.row_counts["4"]) > 1
    assert tensors.row_counts["other"] == (1,)
    jobs = tensors.tensor_jobs(random_inputs(3, 4))
    assert {bucket.label for bucket, _ in jobs} == {"4"}
    assert [row.inputs["x"].shape for _, row in jobs] == [(1, 4)] * 3
    assert all(row.inputs["x"].base is None for _, row in jobs), (
        "a row does not keep its whole request in memory"
    )


def test_rows_of_a_shape_that_was_not_measured_run_alone(tensors):
    jobs = tensors.tensor_jobs(random_inputs(3, 9))
    assert {bucket.label for bucket, _ in jobs} == {"other"}
    assert all(set(bucket.costs) == {1} for bucket, _ in jobs)


def test_few_known_answers_do_not_hide_that_a_size_changes_bits(tmp_path):
    # ONNX Runtime adds up one row alone in another order than several. Three rows of this model
    # have the same bits by chance.
    node = helper.make_node
    model = onnx_model(
        [
            node("Shape", ["x"], ["columns"], start=1, end=2),
            node("Slice", ["w", "zero", "columns", "zero"], ["some"]),
            node("MatMul", ["x", "some"], ["y"]),
        ],
        inputs=[helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "columns"])],
        outputs=[helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        weights={
            "w": np.random.default_rng(3).standard_normal((64, 2)).astype(np.float32),
            "zero": np.array([0], np.int64),
        },
    )
    product = Model.open(tensor_bundle(tmp_path, model=model))
    (bucket,) = [bucket for bucket in product.buckets if bucket.label == "4"]
    inputs = random_inputs(64, 4)
    alone = [answer_alone(job)["y"].tobytes() for job in product.tensor_jobs(inputs)]
    for size in bucket.costs:
        rows = [row for _, row in product.tensor_jobs(inputs)]
        for first in range(0, 64 - size, size):
            answers = bucket.run(rows[first : first + size])
            assert [answer["y"].tobytes() for answer in answers] == alone[first : first + size]


@pytest.mark.parametrize("columns", [4, 9])
def test_a_row_of_tensors_has_the_same_bits_alone_and_in_a_request_of_many(tensors, columns):
    inputs = random_inputs(5, columns)
    outputs = tensors.join([answer_alone(job) for job in tensors.tensor_jobs(inputs)])["y"]
    for row in range(5):
        (job,) = tensors.tensor_jobs({"x": inputs["x"][row : row + 1]})
        assert answer_alone(job)["y"].tobytes() == outputs[row].tobytes()
    expected = (
        inputs["x"] @ np.random.default_rng(3).standard_normal((64, 2)).astype(np.float32)[:columns]
    )
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


def test_without_a_proof_of_independence_a_request_runs_as_a_whole(tmp_path):
    whole = Model.open(tensor_bundle(tmp_path, independent=False))
    assert [bucket.label for bucket in whole.buckets] == ["whole"]
    ((bucket, row),) = whole.tensor_jobs(random_inputs(3, 4))
    assert set(bucket.costs) == {1}
    assert row.inputs["x"].shape == (3, 4)
    (answer,) = bucket.run([row])
    assert whole.join([answer])["y"].shape == (3, 2)


@pytest.mark.parametrize("shape", [[4], [], [3, 4], [-1, 3, 1]])
def test_with_a_tensor_without_a_variable_first_axis_a_request_runs_as_a_whole(tmp_path, shape):
    axes = ["n" if size == -1 else size for size in shape]
    node = helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)
    model = onnx_model([node], inputs=[floats("x", axes)], outputs=[floats("y", [])])
    tensor = np.ones([2 if size == -1 else size for size in shape], np.float32)
    whole = Model.open(tensor_bundle(tmp_path, model=model, known_inputs=[{"x": tensor}]))
    ((bucket, row),) = whole.tensor_jobs({"x": tensor})
    assert bucket.label == "whole"
    assert whole.join(bucket.run([row]))["y"].shape == ()


def test_with_an_output_whose_first_axis_does_not_count_rows_a_request_runs_as_a_whole(tmp_path):
    node = helper.make_node("Concat", ["x", "x"], ["y"], axis=0)
    model = onnx_model([node], inputs=[floats("x", ["n", 2])], outputs=[floats("y", ["m", 2])])
    whole = Model.open(
        tensor_bundle(tmp_path, model=model, known_inputs=[{"x": np.ones((1, 2), np.float32)}])
    )
    assert [bucket.label for bucket in whole.buckets] == ["whole"]


def test_a_model_without_known_answers_runs_each_row_alone(tmp_path):
    bare = Model.open(tensor_bundle(tmp_path, known_inputs=[]))
    assert bare.replayed.verdict == "no answers"
    assert [(bucket.label, set(bucket.costs)) for bucket in bare.buckets] == [("other", {1})]
    assert bare.join([answer_alone(job) for job in bare.tensor_jobs(random_inputs(3, 4))])[
        "y"
    ].shape == (3, 2)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            random_inputs(2, 4, 1),
            r"input 'x' must have the shape \[-1, -1\] \(-1: any\), got \[2, 4, 1\]",
        ),
        ({"x": np.float32(3).reshape(())}, r"got \[\]"),
        ({"x": np.ones((2, 4), np.float64)}, r"input 'x' must be FP32, got FP64"),
        ({"x": np.ones((2, 4), bool)}, r"input 'x' must be FP32, got BOOL"),
        ({"x": np.zeros((0, 4), np.float32)}, r"input 'x' has no rows"),
        ({**random_inputs(2, 4), "z": np.ones(1)}, r"no input 'z'"),
        ({}, r"input 'x' is missing"),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_refused_by_name(tensors, inputs, message):
    with pytest.raises(BadRequest, match=message):
        tensors.tensor_jobs(inputs)


def test_inputs_with_different_numbers_of_rows_are_refused(tmp_path):
    node = helper.make_node("Add", ["a", "b"], ["y"])
    both = [floats("a", ["n", "k"]), floats("b", ["n", "k"])]
    model = onnx_model([node], inputs=both, outputs=[floats("y", ["n", "k"])])
    inputs = {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32)}
    opened = Model.open(tensor_bundle(tmp_path, model=model, known_inputs=[inputs]))
    assert [bucket.label for bucket in opened.buckets] == ["3,3", "other"]
    with pytest.raises(BadRequest, match="input 'b' has 3 rows and 'a' has 2"):
        opened.tensor_jobs({"a": np.ones((2, 3), np.float32), "b": np.ones((3, 3), np.float32)})


def test_inputs_that_the_runtime_refuses_are_a_bad_request_with_its_reason_without_paths(tensors):
    (job,) = tensors.tensor_jobs(random_inputs(1, 65))
    with pytest.raises(BadRequest, match="the model cannot compute with these inputs: ") as refusal:
        answer_alone(job)
    assert "\n" not in str(refusal.value)
    assert "/" not in str(refusal.value)
    assert ".h:" not in str(refusal.value)


def test_an_index_out_of_range_is_a_bad_request(tmp_path):
    model = onnx_model(
        [helper.make_node("Gather", ["table", "i"], ["y"])],
        inputs=[helper.make_tensor_value_info("i", TensorProto.INT64, ["n"])],
        outputs=[floats("y", ["n", 2])],
        weights={"table": np.ones((4, 2), np.float32)},
    )
    opened = Model.open(
        tensor_bundle(tmp_path, model=model, known_inputs=[{"i": np.array([1, 2])}])
    )
    (job,) = opened.tensor_jobs({"i": np.array([9])})
    with pytest.raises(BadRequest, match="idx=9 must be within the inclusive range"):
        answer_alone(job)


def test_nan_in_one_row_changes_no_bit_of_the_others(tmp_path):
    model = onnx_model(
        [helper.make_node("Log", ["x"], ["y"])],
        inputs=[floats("x", ["n"])],
        outputs=[floats("y", ["n"])],
    )
    opened = Model.open(
        tensor_bundle(tmp_path, model=model, known_inputs=[{"x": np.ones(2, np.float32)}])
    )
    jobs = opened.tensor_jobs({"x": np.array([1, np.nan, -1, 0], np.float32)})
    answers = opened.buckets[0].run([row for _, row in jobs])
    assert [str(answer["y"].tolist()) for answer in answers] == [
        "[0.0]",
        "[nan]",
        "[nan]",
        "[-inf]",
    ]


def identity_of_strings():
    both = [
        helper.make_tensor_value_info(name, TensorProto.STRING, ["n", "k"]) for name in ("s", "t")
    ]
    return onnx_model(
        [helper.make_node("Identity", ["s"], ["t"])], inputs=both[:1], outputs=both[1:]
    )


@pytest.mark.parametrize("elements", [["é", "b\0c"], ["é".encode(), b"b\0c"]])
def test_strings_are_tensors_too(tmp_path, elements):
    opened = Model.open(tensor_bundle(tmp_path, model=identity_of_strings(), known_inputs=[]))
    (job,) = opened.tensor_jobs({"s": np.array([elements], object)})
    assert answer_alone(job)["t"].tolist() == [["é", "b\0c"]]
    assert job[1].nbytes > 4


@pytest.mark.parametrize("element", [b"\xff", "\ud83d"])
def test_strings_that_are_not_utf_8_are_refused(tmp_path, element):
    opened = Model.open(tensor_bundle(tmp_path, model=identity_of_strings(), known_inputs=[]))
    with pytest.raises(BadRequest, match="element 1 of input 's' is not UTF-8"):
        opened.tensor_jobs({"s": np.array([["a", element]], object)})


def test_rows_whose_strings_differ_have_other_digests():
    first, second = (ModelRow(inputs={"s": np.array([[text, "c"]], object)}) for text in ("a", "b"))
    assert first.digest() != second.digest()
    assert (
        first.digest() == ModelRow(inputs={"s": np.array([["".join("a"), "c"]], object)}).digest()
    )


def test_a_model_with_a_tensor_that_no_request_can_carry_is_refused(tmp_path):
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16)
    out = helper.make_tensor_value_info("y", TensorProto.BFLOAT16, ["n"])
    model = onnx_model([node], inputs=[floats("x", ["n"])], outputs=[out])
    with pytest.raises(
        BundleError, match="'y' is tensor\\(bfloat16\\), which no request can carry"
    ):
        Model.open(tensor_bundle(tmp_path, model=model, known_inputs=[]))


def test_without_a_certificate_a_request_is_not_split(tmp_path):
    bundle = tensor_bundle(tmp_path)
    (bundle / "certificate.json").unlink()
    assert [bucket.label for bucket in Model.open(bundle, allow_uncertified=True).buckets] == [
        "whole"
    ]


def test_the_description_of_a_row_has_its_digest_and_its_shapes(tensors):
    ((_, row),) = tensors.tensor_jobs(random_inputs(1, 4))
    assert row.description() == f"{row.digest()} x[1, 4]"


@pytest.mark.parametrize("dtype", ["INT8", "UINT8", "INT32", "INT64", "UINT64"])
def test_bounds_hold_for_integers_of_every_type(dtype):
    numpy_dtype = np.dtype(dtype.lower())
    bounds = (Bound(minimum=1, maximum=100),)
    spec = TensorSpec(name="ids", datatype=dtype, shape=(-1, -1), bounds=bounds)
    ends = np.array([[1, 100]], numpy_dtype)
    assert check_inputs({"ids": ends}, [spec])["ids"].tolist() == [[1, 100]]
    for extreme in (np.iinfo(numpy_dtype).min, np.iinfo(numpy_dtype).max):
        ids = np.array([[1, 1], [1, extreme]], numpy_dtype)
        with pytest.raises(BadRequest, match=rf"ids\[1, 1\] must be .* got {extreme}$"):
            check_inputs({"ids": ids}, [spec])


def test_the_first_index_out_of_bounds_is_counted_in_the_whole_input():
    part = (PartOfAxis(axis=1, start=-2),)
    spec = TensorSpec(
        name="ids", datatype="INT64", shape=(-1, -1), bounds=(Bound(minimum=0, part=part),)
    )
    ids = np.array([[-1, -1, 5, 5], [-1, -1, 5, -7]])
    with pytest.raises(BadRequest, match=r"^ids\[1, 3\] must be at least 0, got -7$"):
        check_inputs({"ids": ids}, [spec])
    ids[1, 3] = 0
    check_inputs({"ids": ids}, [spec])
    nothing = np.zeros((0, 4), np.int64)
    assert check_inputs({"ids": nothing}, [spec])["ids"].shape == (0, 4)


def test_each_shape_that_was_not_measured_learns_its_own_time(tensors):
    def bucket_of(columns: int):
        ((bucket, _),) = tensors.tensor_jobs(random_inputs(1, columns))
        return bucket

    assert bucket_of(9) is bucket_of(9)
    assert bucket_of(9) is not bucket_of(10)
    bucket_of(9).learn(0.002)
    assert bucket_of(9).steady_s == 0.002
    assert bucket_of(10).steady_s == math.inf
    assert {bucket_of(9).label, bucket_of(10).label} == {"other"}


def test_the_shapes_that_a_model_knows_are_bounded(tensors):
    ((first, _),) = tensors.tensor_jobs(random_inputs(1, 9))
    for columns in range(10, 1_100):
        tensors.tensor_jobs(random_inputs(1, columns))
    ((again, _),) = tensors.tensor_jobs(random_inputs(1, 9))
    assert again is not first
    assert again.label == "other"
