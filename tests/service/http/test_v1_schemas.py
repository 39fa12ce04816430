"""The description of a model, and the JSON of predictions."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalmode.bundle.certificate import (
    EXACT_ARITHMETIC,
    INTEGER_SATURATION,
    Certificate,
    Statement,
)
from evalmode.service.http.v1_schemas import ModelResponse, PredictResponse, predict_json
from evalmode.service.models.model import Model
from evalmode.service.models.text import Prediction, ScoredLabel
from tests.service.bundles import make_bundle


@pytest.mark.parametrize(
    ("exact", "unsaturated", "determinism"),
    [
        (True, True, "proved everywhere"),
        (True, False, "measured here"),
        (False, True, "measured here"),
    ],
)
def test_a_model_says_on_what_its_determinism_stands(
    tmp_path: Path, exact: bool, unsaturated: bool, determinism: str
) -> None:
    def certify(certificate: Certificate) -> Certificate:
        statements = (
            Statement(name=EXACT_ARITHMETIC, holds=exact, why="for a test"),
            Statement(name=INTEGER_SATURATION, holds=unsaturated, why="for a test"),
        )
        return certificate.model_copy(update={"schema_version": 2, "statements": statements})

    model = Model.open(make_bundle(tmp_path, certify=certify))
    response = ModelResponse.of(model, parallel=1, workers=1)
    assert response.determinism == determinism
    assert response.certificate is not None
    assert len(response.certificate.statements) == 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.open(make_bundle(tmp_path_factory.mktemp("bundle")))


@given(
    scores=st.lists(st.floats(min_value=0, max_value=1), min_size=1, max_size=5),
    label=st.text(),
    truncated=st.booleans(),
)
def test_predictions_have_the_json_of_their_schema_and_every_bit_of_their_scores(
    model: Model, scores: list[float], label: str, truncated: bool
) -> None:
    top = tuple(ScoredLabel(label, score) for score in scores)
    body = predict_json(model, [Prediction(top, truncated)] * 2)
    response = PredictResponse.model_validate_json(body, strict=True)
    assert response.model_dump_json().encode() == body
    assert [scored.score for scored in response.predictions[1].top] == scores
    assert response.predictions[0].label == label
    assert response.predictions[0].truncated is truncated
    assert response.model.digest == model.digest
