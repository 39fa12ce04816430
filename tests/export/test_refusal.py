"""A refusal of the exporter is one sentence that names the model's line and a way out."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from evalmode.export.convert import NotConvertible, convert
from evalmode.export.inputs.errors import UnusableInputs
from evalmode.export.inputs.samples import candidate_of


class Computes(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class UnsupportedOperator(nn.Module):
    """A layer with an operator that ONNX lacks."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x.mT @ x)


class KeepsTables(nn.Module):
    """A dictionary with one table per length."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if length not in self.tables:
            self.tables[length] = torch.arange(length).float()
        return x * self.tables[length][:, None]


class Grows(nn.Module):
    """A buffer that is replaced when it is too short."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(0, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[0] < x.shape[1]:
            self.table = torch.arange(x.shape[1])[:, None] / 10.0 ** torch.arange(4)
        return x + self.table[: x.shape[1]]


def branch_on_sum(x: Tensor) -> Tensor:
    if x.sum() > 0.5:
        return x
    return x * 2


def unroll_length(x: Tensor) -> Tensor:
    return torch.stack([x[:, index] for index in range(x.shape[1])], 1)


@pytest.mark.parametrize(
    ("module", "problem", "line", "way_out"),
    [
        (
            Computes(branch_on_sum),
            "its code branches on numbers that are computed",
            "if x.sum() > 0.5:",
            "torch.where",
        ),
        (
            nn.Sequential(nn.Linear(4, 4), UnsupportedOperator()),
            "ONNX has no operator for aten._linalg_eigh in 1 (UnsupportedOperator)",
            "test_refusal.py:",
            "use one that it has",
        ),
        (KeepsTables(), "used as a plain number", "if length not in self.tables", "--dynamic-axes"),
        (Grows(), "of a fixed size is read at a size that varies", "", "in the constructor"),
        (Computes(unroll_length), "makes length of x the fixed size 5", "", "whole tensors"),
        (
            Computes(lambda x: torch.sparse.mm(x[0].to_sparse(), x[0].T)),
            "cannot trace aten._to_sparse.default",
            "test_refusal.py:",
            "compute it from other operators",
        ),
    ],
)
def test_a_refusal_names_the_line_and_a_way_out(
    module: nn.Module, problem: str, line: str, way_out: str
) -> None:
    name = "input" if isinstance(module, nn.Sequential) else "x"
    axes, inputs = {name: {0: "batch", 1: "length"}}, {name: torch.randn(3, 5, 4)}
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):  # noqa: SIM117
        with pytest.raises(NotConvertible) as caught:
            convert(module.eval(), inputs, dynamic_axes=axes, outputs=["y"])
    message = str(caught.value)
    for part in (problem, line, way_out):
        assert part in message, message
    assert "\n" not in message
    assert not re.search(r"%\w+|call_function|stack trace", message), message
    assert stdout.getvalue() == stderr.getvalue() == ""


def test_complex_answers_are_refused_before_anything_is_written() -> None:
    module = Computes(lambda x: torch.fft.rfft(x, dim=1)).eval()
    with pytest.raises(UnusableInputs, match=r"returns output_0 as complex numbers"):
        candidate_of(module, [torch.randn(3, 5, 4)])
