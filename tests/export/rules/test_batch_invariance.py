"""The rule batch-invariance: rows that depend on their neighbours, and rows that do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from onnxruntime.quantization import (
    quantize_dynamic,
)
from torch import nn

from evalmode.bundle.certificate import Verdict
from evalmode.export.certify import subject_of
from evalmode.export.inputs.samples import candidate_of
from evalmode.export.rules import (
    batch_invariance,
)
from tests.export.rules.quantised import classifier
from tests.export.rules.small_graphs import DOUBLED, ROWS, graph, node, said, subject


def test_a_row_that_is_normalised_by_its_neighbours_fails_with_the_change_in_words() -> None:
    centred = graph(
        node("ReduceMean", "x", "axis", output="mean", keepdims=1),
        node("Sub", "x", "mean"),
        axis=np.array([0]),
    )
    made = subject(centred)
    record = batch_invariance.check(made)
    assert record.verdict is Verdict.FAIL
    assert "another row in the batch changes this row's answer by" in said(record)
    assert made.row_counts == {4: (1,)}


def test_a_row_that_is_moved_only_among_many_fails_too() -> None:
    """Where a batch has less than eight rows, the slice of its last row is empty, and so is the
    sum.
    """
    crowded = graph(
        node("Slice", "x", "from", "to", "axis", output="eighth"),
        node("ReduceSum", "eighth", "axis", output="sum", keepdims=1),
        node("Add", "x", "sum"),
        **{"from": np.array([7]), "to": np.array([8]), "axis": np.array([0])},
    )
    made = subject(crowded)
    assert batch_invariance.check(made).verdict is Verdict.FAIL


def test_rows_that_keep_to_themselves_pass_at_every_batch_size() -> None:
    made = subject(DOUBLED)
    assert batch_invariance.check(made).verdict is Verdict.PASS
    assert made.row_counts == {4: tuple(range(1, 65))}


def test_dynamic_int8_lets_a_row_change_with_its_neighbours(tmp_path: Path) -> None:
    made = classifier(quantize_dynamic, tmp_path)
    record = batch_invariance.check(made)
    assert record.verdict is Verdict.FAIL
    assert "another row in the batch changes this row's answer by " in said(record)


def test_a_batch_norm_without_statistics_lets_a_row_change_with_its_neighbours() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    made = subject_of(candidate_of(module, [torch.from_numpy(ROWS)]))
    record = batch_invariance.check(made)
    assert record.verdict is Verdict.FAIL
    assert "another row in the batch changes this row's answer by " in said(record)
