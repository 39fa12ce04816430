"""The rule held-out: labels of the graph and of the module on rows kept out of training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from evalmode.bundle.certificate import Verdict
from evalmode.export.inputs.evidence import HeldOutBatches
from evalmode.export.rules import held_out
from tests.export.rules.small_graphs import DOUBLED, ROWS, small_subject


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [(lambda x: x + x, Verdict.PASS), (lambda x: -x, Verdict.FAIL)],
    ids=["same", "other"],
)
def test_right_labels_are_counted_for_the_graph_and_the_module(
    answer: Callable[[Tensor], Tensor], verdict: Verdict
) -> None:
    rows = HeldOutBatches(batches=[{"x": ROWS}], labels=[ROWS.argmax(-1)])
    record = held_out.check(small_subject(DOUBLED, answer, held_out=rows))
    assert record.verdict is verdict
    assert record.measured.startswith("8 right of 8, ")


def test_without_held_out_rows_the_rule_does_not_apply() -> None:
    assert held_out.check(small_subject(DOUBLED)).verdict is Verdict.NOT_APPLICABLE
