"""The model that every peer serves: one ONNX Runtime session with one thread, and numpy around it.

Shapes: B rows, T positions, C labels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from front_end import open_front_end

TOP_K = 3


class OnnxModel:
    """A bundle's graph, its front end and its labels."""

    def __init__(self, folder: Path, *, threads: int = 1) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        self.has_mask = "attention_mask" in [tensor.name for tensor in self.session.get_inputs()]
        self.labels: list[str] = json.loads((folder / "manifest.json").read_text())["labels"] or []
        self.front_end = open_front_end(folder)

    def logits(
        self, rows: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None = None
    ) -> np.ndarray:
        """The logits (B, C) of rows of ids, (T,) or (T, G), padded to the longest of them.

        `masks` are the rows' masks, (T,); None where every position counts.
        """
        length = max(len(row) for row in rows)
        input_ids = np.zeros((len(rows), length, *rows[0].shape[1:]), np.int64)
        attention_mask = np.zeros((len(rows), length), np.int64)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
            attention_mask[index, : len(row)] = 1 if masks is None else masks[index]
        inputs = {"input_ids": input_ids}
        if self.has_mask:
            inputs["attention_mask"] = attention_mask
        logits: np.ndarray = self.session.run(None, inputs)[0]
        return logits

    def classify(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """The prediction of each text: `label`, `score`, and the best labels as `top`."""
        assert self.front_end is not None, "this model takes tensors"
        logits = self.logits([self.front_end.encode(text) for text in texts]).astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
        predictions = []
        for row in probabilities:
            best = np.argsort(-row)[:TOP_K]
            top = [{"label": self.labels[label], "score": float(row[label])} for label in best]
            predictions.append({**top[0], "top": top})
        return predictions


def open_model() -> OnnxModel:
    """The model of the folder BENCH_MODEL."""
    return OnnxModel(Path(os.environ["BENCH_MODEL"]))


def cores() -> int:
    """The number of cores: how many processes or replicas a peer starts."""
    return len(os.sched_getaffinity(0))
