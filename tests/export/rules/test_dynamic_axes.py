"""The rule dynamic-axes: fixed axes, other shapes, and bounds of the trace."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evalmode.bundle.certificate import Verdict
from evalmode.export.certify import subject_of
from evalmode.export.inputs.samples import candidate_of
from evalmode.export.rules import dynamic_axes
from tests.export.rules.small_graphs import (
    ROWS,
    Calls,
    graph,
    messages,
    node,
    small_subject,
    subject_of_graph,
)


def test_an_axis_that_varies_passes() -> None:
    subject = small_subject(graph(node("Add", "x", "x")), lambda x: x + x)
    assert dynamic_axes.check(subject).verdict is Verdict.PASS


def test_an_axis_that_the_exporter_fixed_is_named_with_its_size() -> None:
    record = dynamic_axes.check(
        small_subject(graph(node("Add", "x", "x"), rows=8), lambda x: x + x, probes=[{"x": ROWS}])
    )
    assert record.verdict is Verdict.FAIL
    assert messages(record) == "x: axis 0 (batch) is 8 in the graph"


def test_a_size_that_the_module_reads_and_the_graph_does_not_is_named() -> None:
    eight = graph(node("Reshape", "x", "shape"), shape=np.array([8, 4]))
    record = dynamic_axes.check(small_subject(eight, lambda x: x))
    assert record.verdict is Verdict.FAIL
    assert "the module reads x [1, 4], the graph does not: " in messages(record)


def test_an_answer_of_another_shape_than_the_modules_is_named() -> None:
    flat = graph(node("Reshape", "x", "shape"), shape=np.array([-1, 2]))
    record = dynamic_axes.check(small_subject(flat, lambda x: x))
    assert "y: its shape is [16, 2] for x [8, 4], the module's is [8, 4]" in messages(record)


class Branches(nn.Module):
    """Twice its input up to 100 rows; above them an error if `is_limited`, else three times."""

    def __init__(self, *, is_limited: bool) -> None:
        super().__init__()
        self.is_limited = is_limited

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] <= 100:
            return x * 2
        if self.is_limited:
            raise ValueError("at most 100 rows")
        return x * 3


def test_a_branch_for_sizes_beyond_every_probe_is_found_by_the_bound_of_the_trace() -> None:
    record = dynamic_axes.check(
        subject_of(candidate_of(Branches(is_limited=False).eval(), [torch.from_numpy(ROWS)]))
    )
    assert record.verdict is Verdict.FAIL
    assert "the graph is valid for batch up to 100, and the module also reads 101" in messages(
        record
    )


def test_a_module_with_the_same_limit_as_its_graph_passes_and_the_bound_is_reported() -> None:
    record = dynamic_axes.check(
        subject_of(candidate_of(Branches(is_limited=True).eval(), [torch.from_numpy(ROWS)]))
    )
    assert record.verdict is Verdict.PASS
    assert record.measured.endswith("batch at most 100")


def test_without_declared_axes_the_rule_does_not_apply() -> None:
    model = graph(node("Add", "x", "x"))
    subject = subject_of_graph(model, Calls(lambda x: x + x), probes=[{"x": ROWS}])
    assert dynamic_axes.check(subject).verdict is Verdict.NOT_APPLICABLE


@pytest.mark.parametrize(
    ("answer", "where"),
    [
        (lambda y: y * 2 if y.shape[1] == 11 else y, "at length = 11"),
        (lambda y: y * 2 if y.shape[1] % 11 == 0 else y, "at length = 11"),
        (lambda y: y * 2 if y.shape[0] == 7 else y, "at batch = 7"),
        (lambda y: y * 2 if y.shape[1] == 300 else y, "at length = 300"),
        (lambda y: y * 2 if y.shape[0] == y.shape[1] else y, "at batch = 1, length = 1"),
        (lambda y: y * 2 if y.shape[0] * y.shape[1] > 400 else y, "at batch = "),
    ],
)
def test_a_branch_that_no_probe_takes_is_found(
    answer: Callable[[Tensor], Tensor], where: str
) -> None:
    candidate = candidate_of(Calls(answer).eval(), [torch.randn(3, 9, 4), torch.randn(2, 14, 4)])
    record = dynamic_axes.check(subject_of(candidate))
    assert record.verdict is Verdict.FAIL
    assert "the module takes another branch" in messages(record)
    assert where in messages(record)


def test_a_branch_with_the_same_answers_passes() -> None:
    module = Calls(lambda x: x.clone() if x.shape[1] == 11 else x + 0).eval()
    candidate = candidate_of(module, [torch.randn(3, 9, 4), torch.randn(2, 14, 4)])
    assert dynamic_axes.check(subject_of(candidate)).verdict is Verdict.PASS


class MaskedEncoder(nn.Module):
    """The fast path of nn.TransformerEncoder branches on the row count, and answers 0 at padding.

    With `mean`, the answer depends on the values at padding.
    """

    def __init__(self, *, mean: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mean = mean
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1
        )

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(x, src_key_padding_mask=padding)
        return hidden.mean(1) if self.mean else hidden


@pytest.mark.parametrize(("mean", "verdict"), [(False, Verdict.PASS), (True, Verdict.FAIL)])
def test_a_branch_may_change_answers_at_padding_that_nothing_depends_on(
    mean: bool, verdict: Verdict
) -> None:
    samples = []
    for rows, length in ((2, 5), (3, 7)):
        padding = torch.zeros(rows, length, dtype=torch.bool)
        padding[0, 3:] = True
        samples.append({"x": torch.randn(rows, length, 8), "padding": padding})
    subject = subject_of(candidate_of(MaskedEncoder(mean=mean).eval(), samples))
    assert dynamic_axes.check(subject).verdict is verdict
