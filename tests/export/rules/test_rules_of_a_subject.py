"""The rules that run the graph, each on a graph and a module that differ in just what the rule is
for.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from evalmode.bundle.certificate import Verdict
from evalmode.export.inputs.candidate import HeldOut
from evalmode.export.rules import batch_invariance, census, held_out, parity, repeatability
from evalmode.export.rules.subject import Subject
from tests.export.rules.small_graphs import DOUBLED, ROWS, Calls, graph, node, said, subject


def test_parity_passes_for_the_same_function() -> None:
    assert parity.check(subject(DOUBLED)).verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("model", "answer", "why"),
    [
        (DOUBLED, lambda x: 2.0001 * x, ""),
        (DOUBLED, lambda x: (x + x).double(), "type float32, the module's is float64"),
        (DOUBLED, lambda x: torch.cat([x, x]), "shape [8, 4], the module's is [16, 4]"),
        (DOUBLED, lambda x: x + float("inf"), "differs by inf standard deviations"),
        (graph(node("Log", "x")), lambda x: x, "differs by inf standard deviations"),
        (
            graph(node("Cast", "x", to=TensorProto.INT64), kind=TensorProto.INT64),
            lambda x: x.long() + 1,
            "whole numbers",
        ),
    ],
)
def test_parity_fails_for_another_function_and_says_where(
    model: onnx.ModelProto, answer: Callable[[Tensor], Tensor], why: str
) -> None:
    record = parity.check(subject(model, answer))
    assert record.verdict is Verdict.FAIL
    assert why in said(record)


@pytest.mark.parametrize(("deviations", "verdict"), [(5e-5, Verdict.FAIL), (5e-6, Verdict.PASS)])
def test_parity_is_judged_at_a_hundred_thousandth_of_a_standard_deviation(
    deviations: float, verdict: Verdict
) -> None:
    shift = deviations * float((2 * ROWS).std())
    record = parity.check(subject(DOUBLED, lambda x: ((x + x).double() + shift).float()))
    assert record.verdict is verdict
    assert record.limit == "fp32: 1e-05, 0 flipped"
    assert "0 of 9 labels flipped" in record.measured


def test_parity_fails_for_a_difference_that_flips_one_label_within_the_tolerance() -> None:
    near = np.array([[1.0, 1.0 + 1e-6]], np.float32)
    swap = graph(node("Gather", "x", "order", axis=1), order=np.array([1, 0, 2, 3]))
    probe = {"x": np.hstack([near, -np.ones((1, 2), np.float32)])}
    made = Subject(
        module=Calls(lambda x: x).eval(), model=swap, probes=[probe], rows={}, labelled=True
    )
    record = parity.check(made)
    assert record.verdict is Verdict.FAIL
    assert "1 of 1 labels flip" in said(record)
    assert parity.check(dataclasses.replace(made, labelled=False)).verdict is Verdict.PASS, (
        "numbers, not labels"
    )


def test_repeatability_fails_for_noise_with_optimisation_off_and_as_served() -> None:
    noisy = graph(node("RandomUniformLike", "x", output="n"), node("Add", "x", "n"))
    record = repeatability.check(subject(noisy))
    assert record.verdict is Verdict.FAIL
    assert {found.why.split(":")[0] for found in record.findings} == {
        "optimisation off",
        "as served",
    }


def test_repeatability_sees_the_dropout_that_the_optimiser_would_delete() -> None:
    hidden = graph(
        node("Relu", "x", output="a"),
        node("Dropout", "a", "ratio", "on", output="b"),
        node("Relu", "b"),
        ratio=np.float32(0.5),
        on=np.True_,
    )
    record = repeatability.check(subject(hidden))
    assert record.verdict is Verdict.FAIL
    assert {found.why.split(":")[0] for found in record.findings} == {"optimisation off"}


def test_repeatability_passes_for_a_quiet_graph() -> None:
    assert repeatability.check(subject(DOUBLED)).verdict is Verdict.PASS


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


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [(lambda x: x + x, Verdict.PASS), (lambda x: -x, Verdict.FAIL)],
    ids=["same", "other"],
)
def test_held_out_rows_are_counted_on_both_sides(
    answer: Callable[[Tensor], Tensor], verdict: Verdict
) -> None:
    rows = HeldOut(batches=[{"x": ROWS}], labels=[ROWS.argmax(-1)])
    record = held_out.check(subject(DOUBLED, answer, held_out=rows))
    assert record.verdict is verdict
    assert record.measured.startswith("8 right of 8, ")


def test_without_held_out_rows_the_rule_does_not_apply() -> None:
    assert held_out.check(subject(DOUBLED)).verdict is Verdict.NOT_APPLICABLE


class TwoSites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.drop(x), 0.25, self.training) * 2


def test_the_census_names_modules_and_functions_that_drop() -> None:
    made = Subject(module=TwoSites().eval(), model=DOUBLED, probes=[{"x": ROWS}], rows={})
    record = census.check(made)
    assert record.verdict is Verdict.PASS
    assert record.sites[0] == "drop (Dropout, p=0.5): absent"
    assert record.sites[1].startswith("(root) (TwoSites, p=0.25): dropout")
    assert made.module is not None
    assert not made.module.training, "the census trains a copy"


def test_a_site_that_left_a_node_is_unproven() -> None:
    left = graph(helper.make_node("Mul", ["x", "x"], ["y"], name="drop/Mul_0"))
    record = census.check(
        Subject(module=TwoSites().eval(), model=left, probes=[{"x": ROWS}], rows={})
    )
    assert record.verdict is Verdict.UNPROVEN
    assert said(record) == "drop (Dropout): this dropout left 1 nodes in the graph"


def test_the_census_trains_what_cannot_be_copied_and_leaves_it_as_it_was() -> None:
    module = TwoSites().eval()
    module.lock = threading.Lock()
    state = torch.get_rng_state()
    record = census.check(Subject(module=module, model=DOUBLED, probes=[{"x": ROWS}], rows={}))
    assert record.verdict is Verdict.PASS
    assert len(record.sites) == 2
    assert not module.training
    assert not module.drop.training
    assert torch.equal(torch.get_rng_state(), state)
