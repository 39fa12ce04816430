from __future__ import annotations

import asyncio
import dataclasses
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalmode.bundle.certificate import Verdict
from evalmode.bundle.errors import BundleCorrupt, BundleError, ProviderUnavailable
from evalmode.service.errors import InvalidField, NotReady, RunFailed
from evalmode.service.predictor import Predictor, best, softmax

FINITE = st.floats(min_value=-1e4, max_value=1e4, width=32)
LONG = "a much longer text than the sixteen positions of the tiny model"


@pytest.fixture(scope="module")
def predictor(bundle):
    with Predictor.open(bundle, workers=2) as opened:
        yield opened


def test_a_row_gives_the_same_bits_whatever_its_neighbours(predictor, texts):
    alone = [predictor.predict([text])[0] for text in texts]
    assert predictor.predict(texts) == alone
    assert predictor.predict(texts[::-1]) == alone[::-1]
    assert asyncio.run(predictor.predict_async(texts)) == alone


def test_a_model_whose_bits_depend_on_the_batch_size_is_not_batched_and_gives_the_same_bits(tmp_path, texts, bundles):
    bundle = bundles.make(tmp_path, model=bundles.model(batchable=False))
    with Predictor.open(bundle, workers=2) as predictor:
        assert (1,) in predictor.row_counts.values(), "this model was to be unstable"
        alone = [predictor.predict([text])[0] for text in texts]
        assert predictor.predict(texts) == alone


def test_many_threads_asking_at_once_get_the_bits_of_one(predictor, texts):
    alone = [predictor.predict([text])[0] for text in texts]
    slices = [slice(first, first + size) for first in range(0, 160, 7) for size in (1, 5, 40)]
    with ThreadPoolExecutor(8) as pool:
        for part, found in zip(slices, pool.map(lambda part: predictor.predict(texts[part]), slices), strict=True):
            assert found == alone[part]


def test_a_predictor_says_what_it_proved_when_it_was_opened(predictor):
    assert predictor.replayed.verdict == "bitwise"
    assert predictor.replayed.answers == 5
    assert set(predictor.row_counts) == {4, 8, 16}
    assert predictor.labels == ("hu", "nl", "fi", "et", "de")


def test_the_bundles_bytes_are_not_kept_beside_the_session(predictor):
    assert not predictor.bundle.contents


def test_an_empty_text_is_a_prediction(predictor):
    (prediction,) = predictor.predict([""])
    assert not prediction.truncated
    assert 0 < prediction.score <= 1


def test_a_long_text_is_cut_and_says_so_or_is_refused_by_its_place(predictor):
    short, long = predictor.predict(["short", LONG])
    assert (short.truncated, long.truncated) == (False, True)
    with pytest.raises(InvalidField, match="16 positions") as refusal:
        predictor.predict(["short", LONG], truncate=False)
    assert refusal.value.field == "inputs.1"
    assert predictor.predict(["short"], truncate=False) == [short]


@pytest.mark.parametrize(("top_k", "given"), [(1, 1), (3, 3), (5, 5), (100, 5)])
def test_as_many_labels_as_asked_are_given_or_all_there_are(predictor, top_k, given):
    (prediction,) = predictor.predict(["Ez egy rövid mondat."], top_k=top_k)
    scores = [scored.score for scored in prediction.top]
    assert len(scores) == given
    assert scores == sorted(scores, reverse=True)
    assert (prediction.label, prediction.score) == (prediction.top[0].label, prediction.top[0].score)


def test_after_closing_nothing_is_answered(bundle):
    predictor = Predictor.open(bundle)
    predictor.close()
    predictor.close()
    with pytest.raises(NotReady):
        predictor.predict(["a"])


def test_opening_it_loads_no_web_framework_and_no_torch(bundle):
    program = (
        "import sys; from pathlib import Path; from evalmode.service.predictor import Predictor;"
        "Predictor.open(Path(sys.argv[1])).predict(['a']);"
        "print(*{'torch', 'onnx', 'fastapi', 'starlette', 'uvicorn'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program, str(bundle)], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_a_folder_of_one_bundle_is_enough(bundle):
    with Predictor.open(bundle.parent.parent) as predictor:
        assert predictor.bundle.path == bundle


def test_a_bundle_without_a_front_end_is_refused(tmp_path, bundles):
    with pytest.raises(BundleError, match="no front end"):
        Predictor.open(bundles.make(tmp_path, frontend=None))


def test_a_model_with_another_number_of_answers_than_labels_is_refused(tmp_path, bundles):
    with pytest.raises(BundleError, match=r"\(batch, 5 labels\)"):
        Predictor.open(bundles.make(tmp_path, model=bundles.model(labels=4)))


def test_labels_that_the_manifest_does_not_name_are_numbers(tmp_path, bundles):
    with Predictor.open(bundles.make(tmp_path, labels=None)) as predictor:
        assert predictor.labels == ("0", "1", "2", "3", "4")


def test_a_provider_that_is_not_there_is_refused(bundle):
    with pytest.raises(ProviderUnavailable, match="cpu"):
        Predictor.open(bundle, provider="nonsense")


def test_a_changed_bundle_is_refused(tmp_path, bundles):
    bundle = bundles.make(tmp_path)
    (bundle / "model.onnx").write_bytes(b"other")
    with pytest.raises(BundleCorrupt, match=r"model\.onnx"):
        Predictor.open(bundle)


def test_a_known_answer_that_does_not_come_out_is_a_refusal_to_open(tmp_path, bundles):
    def one_bit_off(answer):
        logits = np.nextafter(answer.outputs["logits"], np.float32(np.inf))
        return dataclasses.replace(answer, outputs={"logits": logits})

    with pytest.raises(BundleError, match="known answer 0 does not come out"):
        Predictor.open(bundles.make(tmp_path, change=one_bit_off))


def test_an_uncertified_bundle_is_opened_only_when_that_is_allowed(tmp_path, bundles):
    bundle = bundles.make(tmp_path)
    (bundle / "certificate.json").unlink()
    with pytest.raises(BundleError, match="not certified"):
        Predictor.open(bundle)
    with Predictor.open(bundle, allow_uncertified=True) as predictor:
        assert predictor.replayed is None
        assert predictor.bundle.certificate is None
        assert predictor.predict(["a"])


def test_a_certificate_made_elsewhere_is_held_to_its_tolerance(tmp_path, bundles):
    def elsewhere(certificate):
        platform = certificate.platform.model_copy(update={"cpu_features": ("another",)})
        return certificate.model_copy(update={"platform": platform})

    with Predictor.open(bundles.make(tmp_path, certify=elsewhere)) as predictor:
        assert predictor.replayed.verdict == "within tolerance"
        assert predictor.bundle.certificate.verdict is Verdict.PASS


@pytest.mark.parametrize("bias", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_fail_the_request(tmp_path, bundles, bias):
    with (
        Predictor.open(bundles.make(tmp_path, model=bundles.model(bias=bias))) as predictor,
        pytest.raises(RunFailed, match="not finite"),
    ):
        predictor.predict(["a"])


@given(st.lists(FINITE, min_size=1, max_size=70))
def test_probabilities_sum_to_one_and_keep_the_order_of_the_logits(logits):
    scores = softmax(logits)
    assert math.isclose(math.fsum(scores), 1, rel_tol=1e-14)
    order = sorted(range(len(logits)), key=logits.__getitem__)
    assert [scores[index] for index in order] == sorted(scores)


@given(st.lists(FINITE, min_size=2, max_size=20), st.integers(min_value=1, max_value=19))
def test_a_probability_does_not_depend_on_the_order_of_the_labels(logits, turn):
    turned = logits[turn:] + logits[:turn]
    scores = softmax(logits)
    assert softmax(turned) == scores[turn:] + scores[:turn]


@pytest.mark.parametrize(
    "logits", [[math.nan, 1.0], [1.0, math.nan], [math.inf, 1.0], [1.0, math.inf], [-math.inf, -math.inf]]
)
def test_logits_without_probabilities_are_refused(logits):
    with pytest.raises(RunFailed):
        softmax(logits)


def test_an_impossible_label_has_no_probability():
    assert softmax([0.0, -math.inf]) == [1.0, 0.0]


def test_equal_scores_are_ranked_in_the_order_of_the_labels():
    assert best([0.2, 0.3, 0.2, 0.3], 4) == [1, 3, 0, 2]
    assert best([0.25] * 4, 2) == [0, 1]
