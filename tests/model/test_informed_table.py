"""The initial table of a network, compared with counts that were computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evalmode.model.batches import UNLABELLED, Rows
from evalmode.model.informed_table import SMOOTHING, label_evidence, label_evidence_table

# Id 1 occurs with label 0 only, id 2 with both, id 3 in a row without a label, id 4 nowhere.
ROWS = Rows(
    flat=np.array([1, 1, 2, 0, 2, 2, 2, 0, 3, 3, 3, 3], np.int32),
    offsets=np.array([0, 4, 8, 12]),
    labels=np.array([0, 1, UNLABELLED]),
)


def test_the_evidence_is_the_centred_logarithm_of_the_smoothed_counts():
    evidence = label_evidence(ROWS, vocabulary=5, labels=2)
    half = SMOOTHING / 2
    assert evidence[1] == pytest.approx(np.array([0.5, -0.5]) * np.log((2 + half) / half))
    assert evidence[2] == pytest.approx(np.array([0.5, -0.5]) * np.log((1 + half) / (3 + half)))
    assert not evidence[[0, 3, 4]].any()


def test_the_evidence_for_a_label_does_not_grow_with_the_length_of_its_texts():
    rows = Rows(
        flat=np.array([1, 1, 1, 1, 1, 1, 1, 1], np.int32),
        offsets=np.array([0, 6, 8]),
        labels=np.array([0, 1]),
    )
    assert label_evidence(rows, vocabulary=2, labels=2)[1] == pytest.approx([0.0, 0.0])


@pytest.mark.parametrize("width", [2, 8])
def test_the_table_is_a_rotation_of_the_scaled_evidence(width):
    evidence = label_evidence(ROWS, vocabulary=5, labels=2)
    table = (
        label_evidence_table(ROWS, vocabulary=5, labels=2, width=width, scale=0.5, seed=0)
        .double()
        .numpy()
    )
    factor = 0.5 / evidence[1:3].std()
    assert table @ table.T == pytest.approx(factor**2 * evidence @ evidence.T, abs=1e-6)


def test_evidence_for_more_labels_than_the_width_is_projected():
    rows = Rows(flat=np.arange(1, 41, dtype=np.int32), offsets=np.arange(41), labels=np.arange(40))
    table = label_evidence_table(rows, vocabulary=41, labels=40, width=8, scale=0.1, seed=0)
    assert table.shape == (41, 8)
    assert torch.isfinite(table).all()
    assert table[1:].abs().sum(1).min() > 0


def test_the_rotation_depends_on_the_seed():
    table, same_seed, other_seed = (
        label_evidence_table(ROWS, vocabulary=5, labels=2, width=4, scale=0.1, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(table, same_seed)
    assert not torch.equal(table, other_seed)
