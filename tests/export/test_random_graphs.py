"""The static rules on random graphs: their verdict is the truth, at any depth.

The seeds of the 2,000 graphs are fixed. `EVALMODE_FRESH=1 pytest
tests/export/test_random_graphs.py` draws new ones.
"""

from __future__ import annotations

import os
import random

import onnx
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from evalmode.bundle.certificate import Verdict, overall
from evalmode.export.graph import graph_of
from evalmode.export.rules import opaque_op, stochastic_op, training_mode
from evalmode.export.rules.subject import Subject

from .random_graphs import Writer


def verdict_of(model: onnx.ModelProto) -> Verdict:
    graph = graph_of(model)
    return overall(
        rule.check(Subject(graph=graph)) for rule in (stochastic_op, training_mode, opaque_op)
    )


@settings(
    max_examples=2000,
    deadline=None,
    derandomize="EVALMODE_FRESH" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.randoms(use_true_random=False))
def test_the_verdict_on_a_random_graph_is_the_truth(chance: random.Random) -> None:
    model, truth = Writer(chance).model()
    assert verdict_of(model) is truth
    event(truth)
