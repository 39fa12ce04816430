"""The rule parity: on graphs that differ from their module, and on graphs of lower precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor

from evalmode.bundle.certificate import Verdict
from evalmode.export.certify import subject_of
from evalmode.export.inputs.samples import candidate_of
from evalmode.export.module.network import Network
from evalmode.export.rules import (
    batch_invariance,
    parity,
)
from evalmode.export.rules.subject import Subject
from tests.export.rules.quantised import Classifier, classifier, static_int8
from tests.export.rules.small_graphs import (
    DOUBLED,
    ROWS,
    Calls,
    graph,
    messages,
    node,
    small_subject,
    subject_of_graph,
)


def test_parity_passes_for_the_same_function() -> None:
    assert parity.check(small_subject(DOUBLED)).verdict is Verdict.PASS


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
def test_parity_fails_for_another_function_and_names_the_difference(
    model: onnx.ModelProto, answer: Callable[[Tensor], Tensor], why: str
) -> None:
    record = parity.check(small_subject(model, answer))
    assert record.verdict is Verdict.FAIL
    assert why in messages(record)


@pytest.mark.parametrize(("deviations", "verdict"), [(5e-5, Verdict.FAIL), (5e-6, Verdict.PASS)])
def test_the_limit_of_parity_is_a_hundred_thousandth_of_a_standard_deviation(
    deviations: float, verdict: Verdict
) -> None:
    shift = deviations * float((2 * ROWS).std())
    record = parity.check(small_subject(DOUBLED, lambda x: ((x + x).double() + shift).float()))
    assert record.verdict is verdict
    assert record.limit == "fp32: 1e-05, 0 flipped"
    assert "0 of 9 labels flipped" in record.measured


def test_parity_fails_for_a_difference_that_flips_one_label_within_the_tolerance() -> None:
    scores = np.array([[1.0, 1.0 + 1e-6]], np.float32)
    swap = graph(node("Gather", "x", "order", axis=1), order=np.array([1, 0, 2, 3]))
    probe = {"x": np.hstack([scores, -np.ones((1, 2), np.float32)])}
    module = Calls(lambda x: x).eval()
    record = parity.check(subject_of_graph(swap, module, probes=[probe], labelled=True))
    assert record.verdict is Verdict.FAIL
    assert "1 of 1 labels flip" in messages(record)
    numbers = subject_of_graph(swap, module, probes=[probe])
    assert parity.check(numbers).verdict is Verdict.PASS, "numbers, not labels"


def test_static_int8_keeps_rows_independent_and_has_the_limits_of_int8(tmp_path: Path) -> None:
    subject = classifier(static_int8, tmp_path)
    assert batch_invariance.check(subject).verdict is Verdict.PASS
    assert parity.limits_of(subject.graph.proto) is parity.INT8
    record = parity.check(subject)
    assert record.limit.startswith("int8: ")


def test_half_precision_has_its_own_limits(tmp_path: Path) -> None:
    subject = subject_of(candidate_of(Classifier().half().eval(), [torch.randn(32, 16).half()]))
    assert parity.limits_of(subject.graph.proto) is parity.FP16
    assert parity.check(subject).verdict is Verdict.PASS


@pytest.mark.parametrize("shift", [0.1, float("nan")])
def test_parity_fails_for_another_function_in_half_precision_too(shift: float) -> None:
    subject = subject_of(candidate_of(Classifier().half().eval(), [torch.randn(32, 16).half()]))
    shifted_module = Classifier().half().eval()
    with torch.no_grad():
        shifted_module.body[4].bias[0] += shift
    shifted = Subject(
        network=Network.of(shifted_module),
        graph=subject.graph,
        evidence=dataclasses.replace(subject.evidence, labelled=True),
    )
    assert parity.check(shifted).verdict is Verdict.FAIL
