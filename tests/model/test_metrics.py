"""Figures that can be done by hand, and a temperature that is the best there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from evalmode.bundle.frontend import BpeSpec
from evalmode.model.batches import Rows
from evalmode.model.metrics import (
    fit_temperature,
    fold_temperature,
    log_loss,
    not_tested,
    predict,
    quality,
)

LOGITS = np.log(np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.1, 0.7, 0.2]]))
LABELS = np.array([0, 1, 1, 1])


def test_accuracy_and_macro_f1_are_what_a_hand_computes():
    # Label 0: precision 1/2, recall 1, F1 2/3. Label 1: precision 1, recall 2/3, F1 4/5.
    assert quality(LOGITS[:, :2], LABELS) == pytest.approx(
        {"accuracy": 0.75, "macro_f1": (2 / 3 + 4 / 5) / 2}
    )


def test_a_class_that_was_not_tested_counts_nothing_and_is_named():
    # Label 2 has no row: a mean over the other two would hide that.
    assert quality(LOGITS, LABELS) == pytest.approx(
        {"accuracy": 0.75, "macro_f1": (2 / 3 + 4 / 5) / 3}
    )
    assert not_tested(LABELS, ["a", "b", "c"]) == {"classes": 3, "not_tested": ["c"]}
    assert not_tested(LABELS, ["a", "b"]) == {}
    perfect = np.log(np.array([[0.9, 0.1], [0.8, 0.2]]))
    assert quality(perfect, np.array([0, 0])) == {"accuracy": 1.0, "macro_f1": 0.5}


def test_the_log_loss_is_the_mean_of_minus_log_p():
    assert log_loss(LOGITS, LABELS) == pytest.approx(-np.log([0.7, 0.3, 0.8, 0.7]).mean())


def test_the_temperature_undoes_what_made_the_scores_too_sure():
    draw = np.random.default_rng(0)
    honest = draw.normal(size=(4000, 5)) * 2
    p = np.exp(honest) / np.exp(honest).sum(1, keepdims=True)
    labels = np.array([draw.choice(5, p=row) for row in p])
    assert fit_temperature(honest, labels) == pytest.approx(1.0, abs=0.05)
    assert fit_temperature(honest * 2.5, labels) == pytest.approx(2.5, abs=0.1)


def test_on_a_few_rows_that_are_all_right_the_temperature_keeps_within_reason():
    assert fit_temperature(LOGITS[[0, 2]], LABELS[[0, 2]]) == pytest.approx(0.25, abs=1e-3)


def test_a_folded_temperature_divides_the_logits():
    head, x = nn.Linear(4, 3), torch.randn(5, 4)
    expected = head(x) / 1.7
    fold_temperature(head, 1.7)
    torch.testing.assert_close(head(x), expected)


def test_predictions_come_in_the_order_of_the_rows_and_leave_the_network_as_it_was():
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
