"""A predictor: the answers of a bundle in this process, without a server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from evalmode.bundle.errors import BundleError
from evalmode.service.errors import InvalidField, NotReady, RunFailed
from evalmode.service.models.calibration import Calibration
from evalmode.service.predictor import Predictor
from tests.service.bundles import make_bundle, tensor_bundle, tiny_model

LONG = "a much longer text than the sixteen positions of the tiny model"


@pytest.fixture(scope="module")
def predictor(bundle):
    with Predictor.open(bundle, parallel=2) as predictor:
        yield predictor


def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(predictor, texts):
    alone = [predictor.predict([text])[0] for text in texts]
    assert predictor.predict(texts) == alone
    assert predictor.predict(texts[::-1]) == alone[::-1]
    assert asyncio.run(predictor.predict_async(texts)) == alone


def test_a_model_whose_bits_depend_on_the_batch_size_gives_the_same_bits_too(
    tmp_path,
    texts,
):
    bundle = make_bundle(tmp_path, model=tiny_model(batchable=False))
    with Predictor.open(bundle, parallel=2) as predictor:
        alone = [predictor.predict([text])[0] for text in texts]
        assert predictor.predict(texts) == alone


def test_many_threads_at_once_get_the_bits_of_one_thread(predictor, texts):
    alone = [predictor.predict([text])[0] for text in texts]
    slices = [slice(first, first + size) for first in range(0, 160, 7) for size in (1, 5, 40)]
    with ThreadPoolExecutor(8) as pool:
        for part, predictions in zip(
            slices, pool.map(lambda part: predictor.predict(texts[part]), slices), strict=True
        ):
            assert predictions == alone[part]


def test_batching_does_not_change_the_answers(predictor, bundle, texts):
    with Predictor.open(bundle, parallel=1, calibration=Calibration(budget_s=0)) as alone:
        assert {count for bucket in alone.model.buckets for count in bucket.costs} == {1}
        assert alone.predict(texts) == predictor.predict(texts)


def test_more_texts_than_a_server_would_queue_are_answered(predictor):
    assert len(predictor.predict(["a"] * 5000)) == 5000


def test_no_texts_have_no_predictions(predictor):
    assert predictor.predict([]) == []


def test_an_empty_text_is_a_prediction(predictor):
    (prediction,) = predictor.predict([""])
    assert not prediction.truncated
    assert 0 < prediction.score <= 1


def test_a_long_text_is_marked_as_cut_or_is_refused_with_its_index(predictor):
    short, long = predictor.predict(["short", LONG])
    assert (short.truncated, long.truncated) == (False, True)
    with pytest.raises(InvalidField, match="16 positions") as refusal:
        predictor.predict(["short", LONG], truncate=False)
    assert refusal.value.field == "inputs.1"
    assert predictor.predict(["short"], truncate=False) == [short]


@pytest.mark.parametrize(("top_k", "label_count"), [(1, 1), (3, 3), (5, 5), (100, 5)])
def test_a_prediction_has_top_k_labels_or_all_if_there_are_fewer(predictor, top_k, label_count):
    (prediction,) = predictor.predict(["Ez egy rövid mondat."], top_k=top_k)
    scores = [scored.score for scored in prediction.top]
    assert len(scores) == label_count
    assert scores == sorted(scores, reverse=True)
    assert (prediction.label, prediction.score) == (
        prediction.top[0].label,
        prediction.top[0].score,
    )


def test_numbers_that_are_not_finite_fail_the_request(tmp_path):
    with (
        Predictor.open(make_bundle(tmp_path, model=tiny_model(bias=float("nan")))) as predictor,
        pytest.raises(RunFailed, match="not finite"),
    ):
        predictor.predict(["a"])


def test_a_closed_predictor_refuses_texts(bundle):
    predictor = Predictor.open(bundle)
    predictor.close()
    predictor.close()
    with pytest.raises(NotReady):
        predictor.predict(["a"])


def test_a_predictor_loads_no_web_framework_and_no_torch(bundle):
    program = (
        "import sys; from pathlib import Path; from evalmode.service.predictor import Predictor;"
        "Predictor.open(Path(sys.argv[1])).predict(['a']);"
        "print(*{'torch', 'onnx', 'fastapi', 'starlette', 'uvicorn'} & set(sys.modules))"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, str(bundle)], capture_output=True, text=True, check=True
    )
    assert process.stdout.split() == []


def test_a_folder_of_one_bundle_is_enough(bundle):
    with Predictor.open(bundle.parent.parent) as predictor:
        assert predictor.model.bundle.path == bundle


def test_a_bundle_without_a_front_end_is_refused(tmp_path):
    with pytest.raises(BundleError, match="no front end"):
        Predictor.open(tensor_bundle(tmp_path))
