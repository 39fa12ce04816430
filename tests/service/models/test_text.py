"""Rows of raw ids."""

from __future__ import annotations

import numpy as np
import pytest

from evalmode.bundle.frontend import BpeSpec
from evalmode.service.errors import BadRequest
from evalmode.service.models.text import id_rows

BPE = BpeSpec(vocabulary=100, lengths=(4, 8))


def masked(ids, mask=None):
    inputs = {"input_ids": np.array(ids, np.int64)}
    return list(
        id_rows(
            inputs if mask is None else {**inputs, "attention_mask": np.array(mask, np.int64)}, BPE
        )
    )


def test_a_row_of_tokens_is_as_long_as_its_mask_and_padded_with_zeros():
    short, full = masked([[1, 5, 6, 99], [1, 2, 3, 4]], [[1, 1, 0, 0], [1, 1, 1, 1]])
    assert short.ids.tolist() == [1, 5]
    padded = short.padded(4)
    assert padded["input_ids"].tolist() == [[1, 5, 0, 0]]
    assert padded["attention_mask"].tolist() == [[1, 1, 0, 0]]
    assert full.padded(8)["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]


def test_a_mask_with_holes_is_unchanged():
    (row,) = masked([[7, 8, 9, 0]], [[0, 1, 1, 0]])
    assert row.padded(4)["attention_mask"].tolist() == [[0, 1, 1, 0]]
    assert row.padded(4)["input_ids"].tolist() == [[7, 8, 9, 0]]


def test_without_a_mask_the_ids_that_are_not_padding_count():
    (row,) = masked([[1, 5, 0, 6, 0, 0]])
    assert row.padded(4)["attention_mask"].tolist() == [[1, 1, 0, 1]]
    assert row.padded(4)["input_ids"].tolist() == [[1, 5, 0, 6]]


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, 2]], [[0, 0]], r"row 0 of attention_mask is empty"),
        ([[1, 2]], [[1, 2]], r"attention_mask\[0, 1\] must be at least 0 and below 2, got 2"),
        ([[1, 2]], [[1, -1]], r"attention_mask\[0, 1\] must be at least 0 and below 2, got -1"),
        (
            [[1, 2]],
            [[1, 1, 1]],
            r"attention_mask must have the shape \[1, 2\] of input_ids, got \[1, 3\]",
        ),
        ([[1, 100]], [[1, 1]], r"input_ids\[0, 1\] must be at least 0 and below 100, got 100"),
        ([[0, 0]], None, r"row 0 of input_ids is empty"),
        ([[[1], [2]]], None, r"input_ids must have the shape \[-1, -1\], got \[1, 2, 1\]"),
    ],
)
def test_invalid_tokens_and_masks_are_refused(ids, mask, message):
    with pytest.raises(BadRequest, match=message):
        masked(ids, mask)
