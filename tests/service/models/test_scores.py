"""Scores: correct, in the order of the logits, and the same bits on every machine."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalmode.service.errors import RunFailed
from evalmode.service.models.scores import ranking, softmax

LOGIT = st.floats(min_value=-1e4, max_value=1e4, width=32)
LOGITS = st.lists(LOGIT, min_size=1, max_size=70)

# Prints the digest of many scores, and that of math.exp of the same numbers.
DIGESTS = """
import hashlib, math, struct
import numpy as np
from evalmode.service.models.scores import softmax
logits = np.random.default_rng(1).normal(scale=5, size=(4096, 60)).astype(np.float32)
powers = [math.exp(x) for x in logits.ravel().tolist()]
print(hashlib.sha256(softmax(logits).tobytes()).hexdigest())
print(hashlib.sha256(struct.pack(f"{len(powers)}d", *powers)).hexdigest())
"""
SCORES_SHA256 = "23bb121066cc355642da475e82a03bc15b00decf4568d5b689a4c8561c2ed4b2"


def scores_of(logits: list[float]) -> list[float]:
    return softmax([logits])[0].tolist()


@given(LOGITS)
def test_scores_are_the_probabilities_of_the_logits(logits):
    powers = [(Decimal(logit) - Decimal(max(logits))).exp() for logit in logits]
    for score, power in zip(scores_of(logits), powers, strict=True):
        assert math.isclose(score, power / sum(powers), rel_tol=4e-12, abs_tol=1e-303)


@given(LOGITS)
def test_scores_sum_to_one(logits):
    assert math.isclose(math.fsum(scores_of(logits)), 1, rel_tol=1e-14)


@given(LOGITS)
def test_a_higher_logit_never_has_a_lower_score(logits):
    scores = scores_of(logits)
    order = sorted(range(len(logits)), key=logits.__getitem__)
    assert [scores[index] for index in order] == sorted(scores)


@given(
    st.floats(min_value=-650, max_value=-0.01),
    st.integers(min_value=0, max_value=4),
)
def test_neighbouring_numbers_have_scores_in_their_order(logit, steps):
    # Two float64 numbers a few units of the last place apart, around any step of the table.
    step = math.log(2) / 256
    boundary = (math.floor(logit / step) + 0.5) * step
    lower, higher = boundary, boundary
    for _ in range(steps):
        higher = math.nextafter(higher, math.inf)
    scores = scores_of([0.0, lower, higher])
    assert scores[1] <= scores[2]


@given(LOGITS.filter(lambda logits: len(logits) > 1), st.integers(min_value=1, max_value=19))
def test_a_score_does_not_depend_on_the_order_of_the_labels(logits, turn):
    scores = scores_of(logits)
    assert scores_of(logits[turn:] + logits[:turn]) == scores[turn:] + scores[:turn]


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 64, 65])
@pytest.mark.parametrize("labels", [1, 2, 3, 60, 61])
def test_a_row_has_the_scores_that_it_has_alone(rows, labels):
    logits = np.random.default_rng(rows).normal(scale=9, size=(rows, labels)).astype(np.float32)
    together = softmax(logits)
    for row in range(rows):
        assert together[row].tobytes() == softmax(logits[row : row + 1]).tobytes()


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({}, id="as it is"),
        pytest.param({"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F"}, id="without FMA"),
        pytest.param({"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4"}, id="without wide vectors"),
    ],
)
def test_scores_have_the_same_bits_on_every_processor(environment):
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DIGESTS],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    # The second digest, of math.exp, differs on a processor with FMA.
    assert process.stdout.split()[0] == SCORES_SHA256


@pytest.mark.parametrize(
    "logits",
    [[math.nan, 1.0], [1.0, math.nan], [math.inf, 1.0], [1.0, math.inf], [-math.inf, -math.inf]],
)
def test_logits_without_probabilities_are_refused(logits):
    with pytest.raises(RunFailed):
        softmax([[0.0, 0.0], logits])


def test_an_impossible_label_has_no_probability():
    assert scores_of([0.0, -math.inf]) == [1.0, 0.0]
    assert scores_of([1e308, -1e308]) == [1.0, 0.0]


def test_equal_logits_are_ranked_in_the_order_of_the_labels():
    assert ranking([[0.2, 0.3, 0.2, 0.3], [4.0, 4.0, 4.0, 5.0]]).tolist() == [
        [1, 3, 0, 2],
        [3, 0, 1, 2],
    ]
