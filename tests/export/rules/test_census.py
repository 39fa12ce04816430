"""The rule census: the dropout sites of modules and of functions."""

from __future__ import annotations

import threading

import torch
from onnx import helper
from torch import Tensor, nn

from evalmode.bundle.certificate import Verdict
from evalmode.export.rules import census
from tests.export.rules.small_graphs import DOUBLED, ROWS, graph, messages, subject_of_graph


class TwoSites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.drop(x), 0.25, self.training) * 2


def test_the_census_names_modules_and_functions_that_drop() -> None:
    subject = subject_of_graph(DOUBLED, TwoSites().eval(), probes=[{"x": ROWS}])
    record = census.check(subject)
    assert record.verdict is Verdict.PASS
    assert record.sites[0] == "drop (Dropout, p=0.5): absent"
    assert record.sites[1].startswith("(root) (TwoSites, p=0.25): dropout")
    assert subject.module is not None
    assert not subject.module.training, "the census trains a copy"


def test_a_site_that_left_a_node_is_unproven() -> None:
    left = graph(helper.make_node("Mul", ["x", "x"], ["y"], name="drop/Mul_0"))
    record = census.check(subject_of_graph(left, TwoSites().eval(), probes=[{"x": ROWS}]))
    assert record.verdict is Verdict.UNPROVEN
    assert messages(record) == "drop (Dropout): this dropout left 1 nodes in the graph"


def test_a_module_that_cannot_be_copied_is_trained_and_restored() -> None:
    module = TwoSites().eval()
    module.lock = threading.Lock()
    state = torch.get_rng_state()
    record = census.check(subject_of_graph(DOUBLED, module, probes=[{"x": ROWS}]))
    assert record.verdict is Verdict.PASS
    assert len(record.sites) == 2
    assert not module.training
    assert not module.drop.training
    assert torch.equal(torch.get_rng_state(), state)
