"""Metrics that can be computed by hand, and the temperature with the lowest loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evalmode.bundle.frontend import BpeSpec
from evalmode.model.batches import UNLABELLED, Rows
from evalmode.model.metrics import (
    accuracy_and_f1,
    fold_temperature,
    log_loss,
    optimal_temperature,
    predict,
    untested_classes,
)

LOGITS = np.log(np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.1, 0.7, 0.2]]))
LABELS = np.array([0, 1, 1, 1])


def test_accuracy_and_macro_f1_equal_values_computed_by_hand():
    # Label 0: precision 1/2, recall 1, F1 2/3. Label 1: precision 1, recall 2/3, F1 4/5.
    assert accuracy_and_f1(LOGITS[:, :2], LABELS) == pytest.approx(
        {"accuracy": 0.75, "macro_f1": (2 / 3 + 4 / 5) / 2}
    )


def test_a_class_without_test_rows_counts_as_zero_and_is_named():
    # Label 2 has no row, and a mean over the other two labels would hide that.
    assert accuracy_and_f1(LOGITS, LABELS) == pytest.approx(
        {"accuracy": 0.75, "macro_f1": (2 / 3 + 4 / 5) / 3}
    )
    assert untested_classes(LABELS, ["a", "b", "c"]) == {"classes": 3, "not_tested": ["c"]}
    assert untested_classes(LABELS, ["a", "b"]) == {}
    perfect = np.log(np.array([[0.9, 0.1], [0.8, 0.2]]))
    assert accuracy_and_f1(perfect, np.array([0, 0])) == {"accuracy": 1.0, "macro_f1": 0.5}


def test_the_log_loss_is_the_mean_of_minus_log_p():
    assert log_loss(LOGITS, LABELS) == pytest.approx(-np.log([0.7, 0.3, 0.8, 0.7]).mean())


def test_the_target_of_an_unlabelled_row_is_the_same_for_every_label():
    even, uneven = np.zeros((1, 4)), np.array([[3.0, 0.0, 0.0, 0.0]])
    unlabelled = np.array([UNLABELLED])
    assert log_loss(even, unlabelled) == pytest.approx(np.log(4))
    assert log_loss(uneven, unlabelled) > log_loss(even, unlabelled)


def test_the_temperature_undoes_a_factor_of_the_logits():
    random = np.random.default_rng(0)
    calibrated = random.normal(size=(4000, 5)) * 2
    probabilities = np.exp(calibrated) / np.exp(calibrated).sum(1, keepdims=True)
    labels = np.array([random.choice(5, p=row) for row in probabilities])
    assert optimal_temperature(calibrated, labels) == pytest.approx(1.0, abs=0.05)
    assert optimal_temperature(calibrated * 2.5, labels) == pytest.approx(2.5, abs=0.1)


def highest_score(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return (powers / powers.sum(1, keepdims=True)).max()


def test_the_highest_score_of_correct_rows_is_that_of_the_rule_of_succession():
    logits, labels = LOGITS[[0, 2, 3]] * 40, LABELS[[0, 2, 3]]
    assert highest_score(logits) > 0.999_999
    temperature = optimal_temperature(logits, labels)
    assert highest_score(logits / temperature) == pytest.approx(4 / 5, abs=1e-6)


@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 60),
    classes=st.integers(2, 9),
    wrong=st.floats(0, 1),
    size=st.floats(0.01, 500),
)
def test_no_row_gets_a_higher_score_than_the_rows_support(seed, rows, classes, wrong, size):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(rows, classes)) * size
    labels = np.where(
        random.random(rows) < wrong, random.integers(0, classes, rows), logits.argmax(1)
    )
    temperature = optimal_temperature(logits, labels)
    assert np.isfinite(temperature)
    assert highest_score(logits / temperature) <= (rows + 1) / (rows + 2) + 1e-9


def test_a_bound_that_no_row_reaches_changes_no_bit_of_the_best_temperature():
    random = np.random.default_rng(1)
    logits = random.normal(size=(4000, 5)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([random.choice(5, p=row) for row in probabilities])
    best = optimal_temperature(logits, labels)
    assert highest_score(logits / best) < 4001 / 4002
    losses = [log_loss(logits / (best + step), labels) for step in (-0.01, 0.0, 0.01)]
    assert min(losses) == losses[1]


def test_random_logits_become_even_scores():
    random = np.random.default_rng(2)
    logits, labels = random.normal(size=(2000, 3)) * 50, random.integers(0, 3, 2000)
    assert highest_score(logits / optimal_temperature(logits, labels)) < 0.6


def test_logits_that_are_not_finite_have_a_loss_that_is_not_finite():
    logits = LOGITS.copy()
    logits[1, 1] = np.nan
    assert np.isnan(log_loss(logits / optimal_temperature(logits, LABELS), LABELS))


def test_a_folded_temperature_divides_the_logits():
    head, x = nn.Linear(4, 3), torch.randn(5, 4)
    expected = head(x) / 1.7
    fold_temperature(head, 1.7)
    torch.testing.assert_close(head(x), expected)


def test_predictions_are_in_the_order_of_rows_and_the_network_stays_in_training_mode():
    class Length(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zero = nn.Parameter(torch.zeros(()))

        def forward(self, input_ids, attention_mask):
            assert not self.training
            return attention_mask.sum(1, keepdim=True).float() + self.zero

    lengths = np.array([5, 1, 9, 3, 3, 7] * 60)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = Rows(
        flat=np.ones(offsets[-1], np.int32),
        offsets=offsets,
        labels=np.zeros(len(lengths), np.int64),
    )
    network = Length().train()
    assert np.array_equal(predict(network, rows, spec=BpeSpec(vocabulary=2))[:, 0], lengths)
    assert network.training
