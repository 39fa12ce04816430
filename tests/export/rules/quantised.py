"""A classifier whose graph is changed after the export, as quantisers do."""

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


class Reader(CalibrationDataReader):
    def __init__(self, rows: np.ndarray) -> None:
        self.rows = iter([{"x": rows}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rows, None)


def classifier(change: Callable[[Path, Path], object] | None, folder: Path) -> Subject:
    """A classifier whose graph was changed after the export, as quantisers do."""
    x = (
        torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-1, 1, 32)[:, None]
    )
    made = subject_of(candidate_of(Classifier().eval(), [x]))
    if change is None:
        return made
    # the quantiser infers shapes anew, and transposes weights first
    del made.graph.proto.graph.value_info[:]
    onnx.save(made.graph.proto, folder / "before.onnx")
    change(folder / "before.onnx", folder / "after.onnx")
    return Subject(
        network=made.network,
        graph=graph_of(onnx.load(folder / "after.onnx")),
        evidence=dataclasses.replace(made.evidence, labelled=True),
    )


def quantised(before: Path, after: Path) -> None:
    rows = torch.randn(256, 16, generator=torch.Generator().manual_seed(1)).numpy() * 3
    quantize_static(before, after, Reader(rows.astype(np.float32)), quant_format=QuantFormat.QDQ)
