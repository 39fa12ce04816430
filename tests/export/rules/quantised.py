"""A classifier whose graph is quantised after the export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    quantize_static,
)
from torch import Tensor, nn

from evalmode.export.certify import subject_of
from evalmode.export.graph import graph_of
from evalmode.export.inputs.samples import candidate_of
from evalmode.export.rules.subject import Subject


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class OneBatch(CalibrationDataReader):
    """The rows on which the ranges of the activations are measured."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = iter([{"x": rows}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rows, None)


def classifier(quantise: Callable[[Path, Path], object], folder: Path) -> Subject:
    """The subject of a classifier after `quantise(before, after)` has rewritten its file."""
    x = (
        torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-1, 1, 32)[:, None]
    )
    exported = subject_of(candidate_of(Classifier().eval(), [x]))
    # A quantiser infers shapes itself, after it has transposed weights.
    del exported.graph.proto.graph.value_info[:]
    onnx.save(exported.graph.proto, folder / "before.onnx")
    quantise(folder / "before.onnx", folder / "after.onnx")
    return Subject(
        network=exported.network,
        graph=graph_of(onnx.load(folder / "after.onnx")),
        evidence=dataclasses.replace(exported.evidence, labelled=True),
    )


def static_int8(before: Path, after: Path) -> None:
    """Quantise weights and activations to int8, with ranges from sample rows."""
    rows = torch.randn(256, 16, generator=torch.Generator().manual_seed(1)).numpy() * 3
    quantize_static(before, after, OneBatch(rows.astype(np.float32)), quant_format=QuantFormat.QDQ)
