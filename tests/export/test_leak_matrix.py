"""No randomness of training reaches a bundle: each module is clean and certified, or refused."""

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

MEASURED = [
    (name, state)
    for name, state in product(CASES, STATES)
    if CASES[name].expected(state) is not None
]
CLEAN = [(name, state) for name, state in MEASURED if CASES[name].expected(state) == ()]
REFUSED_IN_EVAL = [name for name, case in CASES.items() if case.in_eval]


def ids(pairs: list[tuple[str, str]]) -> list[str]:
    return [f"{name} {state}".replace("`", "") for name, state in pairs]


@pytest.mark.parametrize(("name", "state"), MEASURED, ids=ids(MEASURED))
def test_a_module_is_certified_or_refused_by_the_expected_rules(name: str, state: str) -> None:
    measured = measure(name, state)
    assert measured is not None
    assert measured.refused == CASES[name].expected(state)


@pytest.mark.parametrize(("name", "state"), CLEAN, ids=ids(CLEAN))
def test_a_certified_graph_answers_as_the_module_under_any_seed(name: str, state: str) -> None:
    measured = measure(name, state)
    assert measured is not None
    assert measured.model is not None
    for sample in samples(CASES[name]):
        graph = run_often(measured.model, sample)
        for number in range(3):
            eager = answers(CASES[name].module(state), sample, number)
            assert len(graph) == len(eager)
            for actual, expected in zip(graph, eager, strict=True):
                np.testing.assert_allclose(
                    actual, expected, rtol=0, atol=1e-5 * max(1.0, float(np.abs(expected).max()))
                )


@pytest.mark.parametrize("name", REFUSED_IN_EVAL)
def test_a_module_refused_in_eval_varies_unless_its_case_says_why_not(
    name: str,
) -> None:
    case = CASES[name]
    inputs = samples(case)[0]
    module_in_eval = case.module("in eval")
    # New modules as well, since the first forward may fix what is random.
    modules = [module_in_eval] * 8 + [case.module("in eval") for _ in range(8)]
    answers_of_runs = [answers(module, inputs, number) for number, module in enumerate(modules)]
    distinct = {b"".join(array.tobytes() for array in arrays) for arrays in answers_of_runs}
    assert (len(distinct) == 1) == bool(case.though_quiet)


def test_every_refusal_is_by_a_rule_or_a_failed_export() -> None:
    refusals = {rule for name, state in MEASURED for rule in CASES[name].expected(state) or ()}
    assert refusals <= {rule.name for rule in RULES} | {*DOES_NOT_RUN, *NO_EXPORT}


def test_there_are_a_hundred_modules_with_a_child() -> None:
    assert len(CASES) >= 100
    assert sum(CASES[name].expected("one child in train") is not None for name in CASES) >= 100
    assert len(CLEAN) >= 50


def test_the_table_in_the_documentation_is_measured() -> None:
    assert DOCUMENT.read_text() == table(), (
        "write it anew with `python -m tests.export.leak_matrix`"
    )


def samples(case: Case) -> list[dict[str, Tensor]]:
    """The input of the case by name, and its rows in reverse order without the last."""
    sample = case.sample
    named = dict(sample) if isinstance(sample, dict) else {"": sample}
    return [named, {name: value.flip(0)[:-1] for name, value in named.items()}]


def answers(module: nn.Module, inputs: dict[str, Tensor], number: int) -> list[np.ndarray]:
    """The tensors that the module returns under a seed, in order."""
    seed(number)
    with torch.no_grad():
        arguments = [value.clone() for value in inputs.values()]
        answer = module(*arguments) if list(inputs) == [""] else module(**inputs)
    return [tensor.numpy() for tensor in flatten(answer).values()]


def run_often(model: onnx.ModelProto, inputs: dict[str, Tensor]) -> list[np.ndarray]:
    """The outputs of the graph without optimisation, after a check that five runs agree bitwise."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    tensors = dict(
        zip((value.name for value in session.get_inputs()), inputs.values(), strict=True)
    )
    feeds = {name: value.numpy() for name, value in tensors.items()}
    first, *repeats = [session.run(None, feeds) for _ in range(5)]
    for repeat in repeats:
        assert [array.tobytes() for array in repeat] == [array.tobytes() for array in first]
    return first
