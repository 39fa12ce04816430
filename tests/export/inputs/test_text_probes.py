"""The probes of a text classifier reach every rung, and held-out rows are all used."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from evalmode.bundle.frontend import BpeSpec, Ids, NgramSpec
from evalmode.bundle.known_answers import Tensors
from evalmode.export.inputs.text_probes import held_out, probes

LADDER = NgramSpec(lengths=(4, 8, 32))


def rows_of(*lengths: int) -> list[Ids]:
    """Rows (T, G) of these lengths; all ids differ, so any id identifies its row."""
    starts = np.cumsum([0, *lengths])
    return [np.arange(2 * a, 2 * b, dtype=np.int64).reshape(-1, 2) + 1 for a, b in pairwise(starts)]


ROWS = rows_of(1, 3, 4, 5, 8, 9, 20, 32)


def ids_of(batch: Tensors) -> Ids:
    return batch["input_ids"]  # type: ignore[return-value]


def real_length(row: Ids) -> int:
    return int(row.any(-1).sum())


def test_probes_have_every_batch_size_at_length_one_at_every_rung_and_at_one_between() -> None:
    shapes = {ids_of(batch).shape[:2] for batch in probes(ROWS, LADDER)}
    assert shapes == {(count, length) for count in (1, 2, 64) for length in (1, 4, 8, 19, 32)}


def test_a_larger_batch_holds_every_row_and_padding_beside_full_rows() -> None:
    (batch,) = [
        ids_of(batch) for batch in probes(ROWS, LADDER) if ids_of(batch).shape[:2] == (64, 32)
    ]
    assert {real_length(row) for row in batch} == {1, 3, 4, 5, 8, 9, 20, 32}
    assert {int(row[0, 0]) for row in batch} == {int(row[0, 0]) for row in ROWS}


def test_probes_are_real_rows_that_are_cut_and_padded_at_the_end() -> None:
    rows_by_id = {int(row[0, 0]): row for row in ROWS}
    for batch in probes(ROWS, LADDER):
        for row in ids_of(batch):
            real = real_length(row)
            np.testing.assert_array_equal(row[:real], rows_by_id[int(row[0, 0])][: len(row)])
            assert not row[real:].any()


def test_probes_of_token_ids_come_with_their_attention_mask() -> None:
    tokens = [row[:, 0] for row in ROWS]
    for batch in probes(tokens, BpeSpec(vocabulary=1000, lengths=(4, 32))):
        np.testing.assert_array_equal(batch["attention_mask"], ids_of(batch) != 0)


@pytest.mark.parametrize(("rung", "lengths"), [(16, {1, 16}), (2, {1, 2}), (1, {1})])
def test_probes_stay_within_a_ladder_of_one_rung(rung: int, lengths: set[int]) -> None:
    spec = NgramSpec(lengths=(rung,))
    assert {ids_of(batch).shape[1] for batch in probes(ROWS, spec)} == lengths


def test_the_probes_are_the_same_each_time() -> None:
    for first, second in zip(probes(ROWS, LADDER), probes(ROWS, LADDER), strict=True):
        np.testing.assert_array_equal(ids_of(first), ids_of(second))


def test_held_out_batches_have_every_row_once_with_its_label_and_at_its_rung() -> None:
    lengths = [1 + (index * 7) % 32 for index in range(300)]
    rows, labels = rows_of(*lengths), np.arange(300, dtype=np.int64)
    batches = held_out(rows, labels, LADDER)
    used_labels = []
    for batch, batch_labels in zip(batches.batches, batches.labels, strict=True):
        padded = ids_of(batch)
        assert 1 <= len(padded) <= 64
        for row, label in zip(padded, batch_labels, strict=True):
            real = real_length(row)
            np.testing.assert_array_equal(row[:real], rows[label])
            assert len(row) == LADDER.padded_length(real)
            used_labels.append(int(label))
    assert sorted(used_labels) == list(range(300))
