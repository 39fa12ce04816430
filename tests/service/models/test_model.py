"""Models of text, opened from real bundles. The tests run their rows without an engine."""

from __future__ import annotations

import dataclasses
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tokenizers import Tokenizer, models, pre_tokenizers

from evalmode.bundle.certificate import Verdict
from evalmode.bundle.errors import (
    BundleCorrupt,
    BundleError,
    BundleNotCertified,
    KnownAnswersDiffer,
    ProviderUnavailable,
)
from evalmode.bundle.frontend import BpeSpec, NgramSpec
from evalmode.service.errors import BadRequest, InvalidField, RunFailed
from evalmode.service.models.calibration import ROW_COUNTS, Calibration
from evalmode.service.models.model import Model
from evalmode.service.models.tensors import content_of
from evalmode.service.models.text import IDS, MASK
from tests.service.bundles import (
    as_proved,
    make_bundle,
    on_another_platform,
    onnx_model,
    tensor_bundle,
    tiny_model,
    token_bundle,
)
from tests.service.by_hand import answer_alone, answers_together, floats

LONG = "a much longer text than the sixteen positions of the tiny model"

VOCABULARY = 512

GRAMS = 6

BPE = BpeSpec(vocabulary=100, lengths=(4, 8))


@pytest.fixture(scope="module")
def model(bundle):
    return Model.open(bundle)


def test_an_open_model_has_its_identity_and_its_measurements(model, bundle):
    assert (model.name, model.version, model.is_text) == ("tiny", "1", True)
    assert model.bundle.path == bundle
    assert not model.bundle.contents, (
        "the session holds the model, and a second copy would waste memory"
    )
    assert model.replayed.verdict == "bitwise"
    assert model.replayed.answers == 5
    assert model.labels == ("hu", "nl", "fi", "et", "de")
    assert [(bucket.label, bucket.positions) for bucket in model.buckets] == [
        ("4", 4),
        ("8", 8),
        ("16", 16),
    ]
    assert set(model.row_counts) == {"4", "8", "16"}
    for bucket in model.buckets:
        assert 1 in bucket.costs
        assert set(bucket.costs) <= set(model.row_counts[bucket.label]) <= set(ROW_COUNTS)


def test_a_proved_model_runs_at_sizes_between_the_measured_ones(tmp_path):
    bundle = make_bundle(tmp_path, certify=as_proved)
    model = Model.open(bundle, calibration=Calibration(budget_s=60))
    for bucket in model.buckets:
        assert model.row_counts[bucket.label] == ROW_COUNTS
        assert bucket.measured_costs is not None
        assert set(bucket.costs) == set(range(1, max(bucket.measured_costs) + 1))
        assert set(bucket.measured_costs) <= set(ROW_COUNTS)


def test_a_text_has_one_bucket_whatever_other_texts_the_request_has(model, texts):
    jobs, _ = model.text_rows(texts)
    for text, (bucket, row) in zip(texts, jobs, strict=True):
        ((single_bucket, single_row),), _ = model.text_rows([text])
        assert single_bucket is bucket
        assert single_row.digest() == row.digest()
        assert row.tokens <= bucket.positions
        assert row.inputs["input_ids"].shape == (1, bucket.positions, GRAMS)
        assert row.nbytes == 8 * bucket.positions * GRAMS


def test_a_text_has_the_same_bits_alone_and_at_each_measured_batch_size(model, texts):
    jobs, _ = model.text_rows(texts)
    for bucket in model.buckets:
        own = [job for job in jobs if job[0] is bucket]
        for size in model.row_counts[bucket.label]:
            for answer, job in zip(
                answers_together(own[:size], size=size), own[:size], strict=True
            ):
                assert content_of(answer) == content_of(answer_alone(job))


def test_an_answer_does_not_keep_its_batch_alive(model):
    jobs, _ = model.text_rows(["a", "b"])
    for answer in answers_together(jobs, size=2):
        assert answer["logits"].shape == (1, 5)
        assert answer["logits"].base is None
        assert answer["logits"].flags.c_contiguous


def test_a_long_text_is_cut_and_marked_or_refused_by_its_index(model):
    assert model.text_rows(["short", LONG])[1] == [False, True]
    with pytest.raises(InvalidField, match="16 positions") as refusal:
        model.text_rows(["short", LONG], truncate=False)
    assert refusal.value.field == "inputs.1"


def test_predictions_are_the_best_labels_first(model):
    jobs, truncated = model.text_rows(["Ez egy rövid mondat.", LONG])
    short, long = model.predictions([answer_alone(job) for job in jobs], truncated, top_k=2)
    assert (len(short.top), short.truncated, long.truncated) == (2, False, True)
    assert short.top[0].score >= short.top[1].score
    assert (short.label, short.score) == (short.top[0].label, short.top[0].score)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_raw_ids_have_the_bits_of_their_text_whatever_the_padding(model, data):
    texts = data.draw(st.lists(st.text(max_size=60), min_size=1, max_size=4))
    jobs, _ = model.text_rows(texts)
    width = data.draw(st.integers(min_value=max(row.tokens for _, row in jobs), max_value=16))
    ids = np.zeros((len(texts), width, GRAMS), np.int64)
    for index, (_, row) in enumerate(jobs):
        ids[index, : row.tokens] = row.inputs["input_ids"][0, : row.tokens]
    raw = model.tensor_jobs({"input_ids": ids})
    for (bucket, row), (expected, text_row) in zip(raw, jobs, strict=True):
        assert bucket is expected
        assert (row.digest(), row.tokens) == (text_row.digest(), text_row.tokens)
    joined = model.join([answer_alone(job) for job in raw])
    assert joined["logits"].shape == (len(texts), 5)
    assert joined["logits"].tobytes() == b"".join(
        answer_alone(job)["logits"].tobytes() for job in jobs
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"input 'input_ids' is missing"),
        ({"ids": np.ones((1, 2, GRAMS), np.int64)}, r"no input 'ids': its inputs are input_ids"),
        ({"input_ids": np.ones((1, 2, GRAMS), np.int32)}, r"'input_ids' must be INT64, got INT32"),
        ({"input_ids": np.ones((1, 2, GRAMS), np.float32)}, r"'input_ids' must be INT64, got FP32"),
        (
            {"input_ids": np.full((1, 2, GRAMS), "x", object)},
            r"'input_ids' must be INT64, got BYTES",
        ),
        (
            {"input_ids": np.ones((1, 2), np.int64)},
            r"must have the shape \[-1, -1, 6\] \(-1: any\), got \[1, 2\]",
        ),
        (
            {"input_ids": np.ones((1, 2, 5), np.int64)},
            r"must have the shape \[-1, -1, 6\] \(-1: any\), got \[1, 2, 5\]",
        ),
        ({"input_ids": np.ones((0, 2, GRAMS), np.int64)}, r"'input_ids' has no rows"),
        ({"input_ids": np.ones((1, 0, GRAMS), np.int64)}, r"row 0 of input_ids is empty"),
        (
            {"input_ids": np.ones((1, 17, GRAMS), np.int64)},
            r"has 17 positions and the model reads at most 16",
        ),
        (
            {"input_ids": np.full((2, 3, GRAMS), 512)},
            r"input_ids\[0, 0, 0\] must be at least 0 and below 512, got 512",
        ),
        (
            {"input_ids": np.full((2, 3, GRAMS), -1)},
            r"input_ids\[0, 0, 0\] must be at least 0 and below 512, got -1",
        ),
    ],
)
def test_raw_ids_that_do_not_fit_the_model_are_refused_by_name(model, inputs, message):
    with pytest.raises(BadRequest, match=message):
        model.tensor_jobs(inputs)


def test_a_row_in_which_no_position_counts_is_refused_by_its_index(model):
    ids = np.ones((3, 4, GRAMS), np.int64)
    ids[1] = 0
    with pytest.raises(BadRequest, match=r"row 1 of input_ids is empty.*NaN") as refusal:
        model.tensor_jobs({"input_ids": ids})
    assert refusal.value.field == "input_ids"


@pytest.fixture(scope="module", params=[True, False], ids=["with a mask", "without one"])
def tokens(request, tmp_path_factory):
    """A model of tokens, whose graph has the mask as an input or not."""
    random = np.random.default_rng(5)
    weights = {
        "table": random.standard_normal((100, 16)).astype(np.float32),
        "head": random.standard_normal((16, 3)).astype(np.float32),
        "one": np.array([1], np.int64),
    }
    ids, mask = (
        helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "t"]) for name in (IDS, MASK)
    )
    node = helper.make_node
    real = [] if request.param else [node("Sign", [IDS], [MASK])]
    nodes = [
        *real,
        node("Cast", [MASK], ["real"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["real", "one"], ["weights"]),
        node("Gather", ["table", IDS], ["embedded"]),
        node("MatMul", ["weights", "embedded"], ["pooled"]),
        node("MatMul", ["pooled", "head"], ["headed"]),
        node("Squeeze", ["headed", "one"], ["logits"]),
    ]
    inputs = [ids, mask] if request.param else [ids]
    model = onnx_model(nodes, inputs=inputs, outputs=[floats("logits", ["b", 3])], weights=weights)
    tokenizer = Tokenizer(
        models.WordLevel({"?": 2, **{letter: 3 + at for at, letter in enumerate("abcdefgh")}}, "?")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return Model.open(
        token_bundle(tmp_path_factory.mktemp("tokens"), model, tokenizer.to_str(), spec=BPE)
    )


def test_raw_tokens_have_the_bits_of_their_text(tokens):
    texts = ["a b c", "d", "", "e f g h a b", "z z"]
    jobs, _ = tokens.text_rows(texts)
    ids, mask = np.zeros((2, 5, 8), np.int64)
    for index, (_, row) in enumerate(jobs):
        ids[index, : row.tokens] = row.inputs[IDS][0, : row.tokens]
        mask[index, : row.tokens] = 1
    masked_too = MASK in {spec.name for spec in tokens.inputs}
    for inputs in [{IDS: ids}, {IDS: ids, MASK: mask}][: 1 + masked_too]:
        raw = tokens.tensor_jobs(inputs)
        assert [bucket for bucket, _ in raw] == [bucket for bucket, _ in jobs]
        assert [content_of(answer_alone(job)) for job in raw] == [
            content_of(answer_alone(job)) for job in jobs
        ]
    assert [bucket.label for bucket, _ in jobs] == ["4", "4", "4", "8", "4"]


def test_a_mask_is_refused_if_the_graph_has_no_input_for_it(tokens):
    both = {IDS: np.ones((1, 2), np.int64), MASK: np.ones((1, 2), np.int64)}
    if MASK in {spec.name for spec in tokens.inputs}:
        assert tokens.tensor_jobs(both)
    else:
        with pytest.raises(BadRequest, match="no input 'attention_mask'"):
            tokens.tensor_jobs(both)


@pytest.mark.parametrize("bias", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_give_no_prediction(tmp_path, bias):
    model = Model.open(make_bundle(tmp_path, model=tiny_model(bias=bias)))
    jobs, truncated = model.text_rows(["a", "b"])
    answers = answers_together(jobs, size=2)
    with pytest.raises(RunFailed, match="output 'logits' holds numbers that are not finite"):
        model.predictions(answers, truncated, top_k=1)


def test_outputs_of_different_shapes_are_not_joined_and_may_be_left_out(model):
    answers = [{"logits": np.ones((1, 5)), "states": np.ones((1, length, 2))} for length in (4, 8)]
    assert model.join(answers, outputs=["logits"])["logits"].shape == (2, 5)
    with pytest.raises(BadRequest, match="output 'states' different shapes"):
        model.join(answers, outputs=["logits", "states"])


def test_many_threads_on_one_model_get_the_bits_of_one(model, texts):
    jobs, _ = model.text_rows(texts)
    expected = [content_of(answer_alone(job)) for job in jobs]
    gate = threading.Barrier(8)

    def ask(_):
        gate.wait()
        return [content_of(answer_alone(job)) for job in jobs]

    with ThreadPoolExecutor(8) as pool:
        assert all(contents == expected for contents in pool.map(ask, range(8)))


def test_a_model_whose_bits_depend_on_the_batch_size_is_not_batched(tmp_path):
    unstable = Model.open(make_bundle(tmp_path, model=tiny_model(batchable=False)))
    assert (1,) in unstable.row_counts.values(), "this model must be unstable"


def test_without_a_budget_every_row_runs_alone(bundle):
    opened = Model.open(bundle, calibration=Calibration(budget_s=0))
    assert {bucket.label: set(bucket.costs) for bucket in opened.buckets} == {
        "4": {1},
        "8": {1},
        "16": {1},
    }


def test_a_model_with_another_number_of_logits_than_labels_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"\(batch, 5 labels\)"):
        Model.open(make_bundle(tmp_path, model=tiny_model(labels=4)))


def test_without_labels_in_the_manifest_the_labels_are_numbers(tmp_path):
    assert Model.open(make_bundle(tmp_path, labels=None)).labels == ("0", "1", "2", "3", "4")


def test_a_missing_provider_is_refused(bundle):
    with pytest.raises(ProviderUnavailable, match="cpu"):
        Model.open(bundle, provider="nonsense")


def test_a_changed_bundle_is_refused(tmp_path):
    bundle = make_bundle(tmp_path)
    (bundle / "model.onnx").write_bytes(b"other")
    with pytest.raises(BundleCorrupt, match=r"model\.onnx"):
        Model.open(bundle)


def test_a_bundle_whose_known_answer_differs_is_refused(tmp_path):
    def one_bit_off(answer):
        logits = np.nextafter(answer.outputs["logits"], np.float32(np.inf))
        return dataclasses.replace(answer, outputs={"logits": logits})

    with pytest.raises(BundleError, match="known answer 0 is not reproduced"):
        Model.open(make_bundle(tmp_path, change=one_bit_off))


def test_an_uncertified_bundle_is_opened_only_when_that_is_allowed(tmp_path):
    bundle = make_bundle(tmp_path)
    (bundle / "certificate.json").unlink()
    with pytest.raises(BundleError, match="not certified"):
        Model.open(bundle)
    opened = Model.open(bundle, allow_uncertified=True)
    assert opened.replayed is None
    assert opened.bundle.certificate is None
    assert opened.text_rows(["a"])


@pytest.mark.parametrize("mode", [True, False])
def test_a_forged_certificate_is_not_believed(tmp_path, mode):
    """The certificate, its seal and the known answers are right for the model that drops."""
    bundle = tensor_bundle(tmp_path, model=dropping_model(mode=mode), known_inputs=[])
    if not mode:
        assert Model.open(bundle).graph_fault is None
        return
    with pytest.raises(BundleNotCertified, match="the node 'drop' is Dropout, which has a train"):
        Model.open(bundle)
    opened = Model.open(bundle, allow_uncertified=True)
    assert "'drop' is Dropout" in opened.graph_fault


def dropping_model(*, mode):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64]) for name in "xy")
    drop = helper.make_node("Dropout", ["x", "rate", "mode"], ["y"], name="drop")
    weights = {"rate": np.array(0.5, np.float32), "mode": np.array(mode)}
    return onnx_model([drop], inputs=[x], outputs=[y], weights=weights)


def test_a_certificate_of_another_platform_allows_its_tolerance(tmp_path):
    opened = Model.open(make_bundle(tmp_path, certify=on_another_platform))
    assert opened.replayed.verdict == "within tolerance"
    assert [difference.what for difference in opened.replayed.differences] == [
        "ONNX Runtime",
        "CPU features",
    ]
    assert opened.bundle.certificate.verdict is Verdict.PASS


@pytest.mark.parametrize("certified", ["here", "elsewhere with a tolerance of 1e9"])
def test_a_dropout_that_still_runs_is_refused_whatever_its_certificate_says(tmp_path, certified):
    def certify(certificate):
        if certified == "here":
            return certificate
        return on_another_platform(certificate).model_copy(update={"tolerance": 1e9})

    bundle = make_bundle(tmp_path, model=tiny_model(dropout=0.5), certify=certify)
    with pytest.raises(BundleNotCertified, match="Dropout, which has a training mode"):
        Model.open(bundle)
    with pytest.raises(KnownAnswersDiffer, match="known answer 0 does not repeat"):
        Model.open(bundle, allow_uncertified=True)


def test_the_constants_of_this_file_are_those_of_the_tiny_model(model):
    assert isinstance(model.frontend.spec, NgramSpec)
    assert (model.frontend.spec.vocabulary, model.frontend.spec.ids_per_position) == (
        VOCABULARY,
        GRAMS,
    )
