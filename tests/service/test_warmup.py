from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np
import pytest

from evalmode.bundle.errors import BundleError
from evalmode.bundle.frontend import NgramFrontEnd, NgramSpec
from evalmode.bundle.known_answers import KnownAnswer
from evalmode.service.warmup import ROW_COUNTS, measure_row_counts, rows_to_measure

FRONTEND = NgramFrontEnd(NgramSpec(lengths=(2, 4, 8), orders=2, characters=2, vocabulary=64))


def answer(text: str | None) -> KnownAnswer:
    return KnownAnswer(inputs={}, outputs={}, text=text)


def exact(inputs):
    return {"logits": inputs["input_ids"].sum((1, 2)).astype(np.float32)}


@pytest.mark.parametrize("texts", [("one text", "", "another, longer text"), ("",), (None,), ()])
def test_every_length_is_measured_with_a_full_row_and_with_shorter_ones_that_belong_to_it(texts):
    rows = rows_to_measure([answer(text) for text in texts], frontend=FRONTEND)
    shortest = 1
    for length, some in rows.items():
        used = [int((row["input_ids"] > 0).any(-1).sum()) for row in some]
        assert all(row["input_ids"].shape == (1, length, 4) for row in some)
        assert max(used) == length
        assert min(used) >= shortest
        shortest = length + 1
    assert tuple(rows) == FRONTEND.spec.lengths


def test_a_model_without_batch_effects_may_run_at_every_size():
    rows = rows_to_measure([answer("a text")], frontend=FRONTEND)
    found = measure_row_counts(exact, rows, path=Path("here"))
    assert found == dict.fromkeys(FRONTEND.spec.lengths, ROW_COUNTS)


def test_a_model_that_does_not_repeat_itself_is_refused():
    noise = count()

    def restless(inputs):
        return {"logits": exact(inputs)["logits"] + next(noise)}

    rows = rows_to_measure([answer("a text")], frontend=FRONTEND)
    with pytest.raises(BundleError, match="not deterministic"):
        measure_row_counts(restless, rows, path=Path("here"))
