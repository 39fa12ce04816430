"""The description of a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from evalmode.bundle.certificate import (
    EXACT_ARITHMETIC,
    INTEGER_SATURATION,
    Certificate,
    Statement,
)
from evalmode.service.http.v1_schemas import ModelResponse
from evalmode.service.models.model import Model
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
