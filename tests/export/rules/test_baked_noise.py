"""The rule baked-noise: noise from the export is a constant, so the graph answers repeatably."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalmode.bundle.certificate import Record, Verdict
from evalmode.errors import EvalmodeError
from evalmode.export.certify import subject_of
from evalmode.export.inputs.samples import candidate_of
from evalmode.export.rules import baked_noise, repeatability, stochastic_op, training_mode
from evalmode.export.rules.subject import Export, Subject

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Calls(nn.Module):
    """A linear layer and a function of its output, which may use the object `source`.

    Masks have 64 elements. Two exports would sometimes draw the same mask of four: constants that
    the exporter folds are drawn from a generator that no seed reaches.
    """

    def __init__(self, answer: Callable[[Any, Tensor], Tensor], source: object = None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 64)
        self.register_buffer("table", torch.full((64,), 0.5))
        self.answer = answer
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self, self.linear(x))


def subject_with(answer: Callable[[Any, Tensor], Tensor], source: object = None) -> Subject:
    torch.manual_seed(0)
    return subject_of(candidate_of(Calls(answer, source).eval(), [X]))


def cached_mask(module: Any, x: Tensor) -> Tensor:
    if module.source is None:
        module.source = torch.bernoulli(module.table)
    return x * module.source


def messages(record: Record) -> str:
    return "; ".join(map(str, record.findings))


CONSTANTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], object]] = {
    "a numpy mask": (
        lambda m, x: x * torch.from_numpy((np.random.rand(64) < 0.5).astype(np.float32)),
        None,
    ),
    "a python factor": (lambda m, x: x * random.random(), None),
    "a private numpy generator": (
        lambda m, x: x * torch.from_numpy(m.source.random(64, dtype=np.float32)),
        np.random.default_rng(0),
    ),
    "a private python generator": (lambda m, x: x * m.source.random(), random.Random(0)),
    "torch.bernoulli of a buffer": (lambda m, x: x * torch.bernoulli(m.table), None),
    "dropout of a table": (lambda m, x: x + F.dropout(m.table, 0.5, training=True), None),
    "torch.distributions": (
        lambda m, x: x * torch.distributions.Bernoulli(m.table, validate_args=False).sample(),
        None,
    ),
    "a mask that the first forward keeps": (cached_mask, None),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_noise_in_a_constant_is_found(name: str) -> None:
    subject = subject_with(*CONSTANTS[name])
    record = baked_noise.check(subject)
    assert record.verdict is Verdict.FAIL, name
    assert all(finding.fix for finding in record.findings)


@pytest.mark.parametrize(
    "name", ["a numpy mask", "a private python generator", "torch.bernoulli of a buffer"]
)
def test_no_other_rule_on_graphs_finds_noise_in_a_constant(name: str) -> None:
    subject = subject_with(*CONSTANTS[name])
    bare = Subject(graph=subject.graph)
    records = [
        stochastic_op.check(bare),
        training_mode.check(bare),
        repeatability.check(subject),
    ]
    assert [record.verdict for record in records] == [Verdict.PASS] * 3


def test_the_noisy_weight_is_named_with_the_node_that_reads_it() -> None:
    torch.manual_seed(0)
    module = Calls(cached_mask).eval()
    candidate = candidate_of(module, [X])
    module(X)  # a rule that watches the module runs it first
    record = baked_noise.check(subject_of(candidate))
    assert (
        "(weight): its values differ in another export, under other seeds; it is read by /Mul_"
        in messages(record)
    )


def test_a_folded_dropout_is_named_from_the_graph_before_optimisation() -> None:
    record = baked_noise.check(subject_with(*CONSTANTS["dropout of a table"]))
    assert "it draws in the graph before optimisation" in messages(record)


def test_a_quiet_module_has_equal_exports() -> None:
    record = baked_noise.check(subject_with(lambda m, x: F.dropout(x, 0.5, m.training) * m.table))
    assert record.verdict is Verdict.PASS
    assert record.findings == ()
    assert record.measured.endswith("in 2 exports")


def test_random_numbers_in_a_buffer_are_weights_and_pass() -> None:
    module = Calls(lambda m, x: x * m.mask)
    module.register_buffer("mask", torch.bernoulli(torch.full((4, 64), 0.5)).sum(0))
    assert baked_noise.check(subject_of(candidate_of(module.eval(), [X]))).verdict is Verdict.PASS


def test_a_second_export_that_fails_is_unproven() -> None:
    def fails() -> Any:
        raise EvalmodeError("the factory returned another network")

    subject = subject_with(lambda m, x: x)
    failing = Subject(
        network=subject.network,
        graph=subject.graph,
        evidence=subject.evidence,
        export=Export(twins=[fails]),
    )
    record = baked_noise.check(failing)
    assert record.verdict is Verdict.UNPROVEN
    assert "the factory returned another network" in messages(record)


def test_the_states_of_the_global_generators_are_unchanged() -> None:
    module = Calls(lambda m, x: x).eval()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    baked_noise.check(subject_of(candidate_of(module, [X])))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
