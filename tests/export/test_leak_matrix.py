"""No randomness of training reaches a bundle in silence: every module is certified because it is
clean, or refused.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from evalmode.export.module.outputs import flatten
from evalmode.export.rules.registry import RULES
from tests.export.leak_matrix import CASES, measure, table
from tests.export.leaks.case import DOES_NOT_RUN, NO_EXPORT, STATES, Case, seed

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "leak-matrix.md"

ANSWERED = [
    (name, state)
    for name, state in product(CASES, STATES)
    if CASES[name].expected(state) is not None
]
CLEAN = [(name, state) for name, state in ANSWERED if CASES[name].expected(state) == ()]
REFUSED_IN_EVAL = [name for name, case in CASES.items() if case.in_eval]


def ids(pairs: list[tuple[str, str]]) -> list[str]:
    return [f"{name} {state}".replace("`", "") for name, state in pairs]


@pytest.mark.parametrize(("name", "state"), ANSWERED, ids=ids(ANSWERED))
def test_a_module_is_certified_or_refused_by_the_rules_that_reason_says(
    name: str, state: str
) -> None:
    found = measure(name, state)
    assert found is not None
    assert found.refused == CASES[name].expected(state)


@pytest.mark.parametrize(("name", "state"), CLEAN, ids=ids(CLEAN))
def test_what_is_certified_really_is_clean(name: str, state: str) -> None:
    found = measure(name, state)
    assert found is not None
    assert found.model is not None
    for sample in samples(CASES[name]):
        graph = run_often(found.model, sample)
        for number in range(3):
            eager = answers(CASES[name].module(state), sample, number)
            assert len(graph) == len(eager)
            for one, other in zip(graph, eager, strict=True):
                np.testing.assert_allclose(
                    one, other, rtol=0, atol=1e-5 * max(1.0, float(np.abs(other).max()))
                )


@pytest.mark.parametrize("name", REFUSED_IN_EVAL)
def test_what_is_refused_in_eval_varies_there_unless_its_declaration_says_why_not(
    name: str,
) -> None:
    case = CASES[name]
    inputs = samples(case)[0]
    one = case.module("in eval")
    # what the first forward decides, too
    modules = [one] * 8 + [case.module("in eval") for _ in range(8)]
    found = [answers(module, inputs, number) for number, module in enumerate(modules)]
    seen = {b"".join(array.tobytes() for array in arrays) for arrays in found}
    assert (len(seen) == 1) == bool(case.though_quiet)


def test_every_refusal_is_a_rules_or_says_what_it_is() -> None:
    refusals = {rule for name, state in ANSWERED for rule in CASES[name].expected(state) or ()}
    assert refusals <= {rule.name for rule in RULES} | {*DOES_NOT_RUN, *NO_EXPORT}


def test_there_are_well_over_a_hundred_modules_and_most_have_a_child() -> None:
    assert len(CASES) >= 100
    assert sum(CASES[name].expected("one child in train") is not None for name in CASES) >= 100
    assert len(CLEAN) >= 50


def test_the_table_in_the_documents_is_what_was_measured() -> None:
    assert DOCUMENT.read_text() == table(), (
        "write it anew with `python -m tests.export.leak_matrix`"
    )


def samples(case: Case) -> list[dict[str, Tensor]]:
    """The case's input by name, and its rows the other way round, the first of them left out."""
    sample = case.sample
    named = dict(sample) if isinstance(sample, dict) else {"": sample}
    return [named, {name: value.flip(0)[:-1] for name, value in named.items()}]


def answers(module: nn.Module, inputs: dict[str, Tensor], number: int) -> list[np.ndarray]:
    """What the module answers under a seed, in order."""
    seed(number)
    with torch.no_grad():
        given = [value.clone() for value in inputs.values()]
        answer = module(*given) if list(inputs) == [""] else module(**inputs)
    return [tensor.numpy() for tensor in flatten(answer).values()]


def run_often(model: onnx.ModelProto, inputs: dict[str, Tensor]) -> list[np.ndarray]:
    """What the graph answers in one session without optimisation, the same bits five times."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given = dict(zip((value.name for value in session.get_inputs()), inputs.values(), strict=True))
    feeds = {name: value.numpy() for name, value in given.items()}
    first, *others = [session.run(None, feeds) for _ in range(5)]
    for other in others:
        assert [array.tobytes() for array in other] == [array.tobytes() for array in first]
    return first
