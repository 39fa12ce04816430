"""The rule repeatability, with optimisation off and as served."""

from __future__ import annotations

import numpy as np

from evalmode.bundle.certificate import Verdict
from evalmode.export.rules import repeatability
from tests.export.rules.small_graphs import DOUBLED, graph, node, small_subject


def test_repeatability_fails_for_noise_with_optimisation_off_and_as_served() -> None:
    noisy = graph(node("RandomUniformLike", "x", output="n"), node("Add", "x", "n"))
    record = repeatability.check(small_subject(noisy))
    assert record.verdict is Verdict.FAIL
    assert {finding.why.split(":")[0] for finding in record.findings} == {
        "optimisation off",
        "as served",
    }


def test_repeatability_finds_the_dropout_that_the_optimiser_deletes() -> None:
    hidden = graph(
        node("Relu", "x", output="a"),
        node("Dropout", "a", "ratio", "on", output="b"),
        node("Relu", "b"),
        ratio=np.float32(0.5),
        on=np.True_,
    )
    record = repeatability.check(small_subject(hidden))
    assert record.verdict is Verdict.FAIL
    assert {finding.why.split(":")[0] for finding in record.findings} == {"optimisation off"}


def test_repeatability_passes_for_a_quiet_graph() -> None:
    assert repeatability.check(small_subject(DOUBLED)).verdict is Verdict.PASS
