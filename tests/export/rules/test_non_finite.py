"""The rule non-finite: answers and weights that are not numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from evalmode.bundle.certificate import Verdict
from evalmode.export.rules import non_finite
from tests.export.rules.small_graphs import graph, messages, node, small_subject


@pytest.mark.parametrize(
    ("model", "answer", "why"),
    [
        (graph(node("Log", "x")), lambda x: x, "the answer holds a NaN"),
        (
            graph(node("Log", "x")),
            torch.log,
            "the answer holds a NaN, and so does the module's own",
        ),
        (
            graph(node("Div", "x", "zero"), zero=np.float32(0)),
            lambda x: x,
            "the answer holds an infinity",
        ),
        (graph(node("Add", "x", "w"), w=np.array([np.nan] * 4, np.float32)), lambda x: x, "w"),
    ],
)
def test_an_output_or_weight_that_is_not_finite_is_named(
    model: onnx.ModelProto, answer: Callable[[Tensor], Tensor], why: str
) -> None:
    record = non_finite.check(small_subject(model, answer))
    assert record.verdict is Verdict.FAIL
    assert why in messages(record)


def test_an_infinity_that_the_module_answers_with_too_passes() -> None:
    subject = small_subject(graph(node("Div", "x", "zero"), zero=np.float32(0)), lambda x: x / 0)
    assert non_finite.check(subject).verdict is Verdict.PASS
