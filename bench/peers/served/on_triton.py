"""Triton through PyTriton: its dynamic batcher, and a Python instance for each core.

The batcher joins requests of one shape, so rows of ids are joined with rows of their own length.

BENCH_MODEL=bundles/languages/1 python on_triton.py HTTP_PORT GRPC_PORT METRICS_PORT FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from onnx_model import cores, open_model
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

model = open_model()


@batch
def classify(text: np.ndarray) -> dict[str, np.ndarray]:
    """The labels (B, 1) and scores (B, 1) of texts (B, 1)."""
    predictions = model.classify([row[0].decode() for row in text])
    return {
        "label": np.array([[prediction["label"].encode()] for prediction in predictions]),
        "score": np.array([[prediction["score"]] for prediction in predictions]),
    }


@batch
def infer(input_ids: np.ndarray, attention_mask: np.ndarray) -> dict[str, np.ndarray]:
    """The logits (B, C) of ids (B, T) and masks (B, T)."""
    return {"logits": model.logits(input_ids, attention_mask)}


if __name__ == "__main__":
    http_port, grpc_port, metrics_port = map(int, sys.argv[1:4])
    config = TritonConfig(
        http_port=http_port,
        http_address="127.0.0.1",
        grpc_port=grpc_port,
        metrics_port=metrics_port,
    )
    if model.labels:
        function = classify
        inputs = [Tensor(name="text", dtype=bytes, shape=(1,))]
        outputs = [
            Tensor(name="label", dtype=bytes, shape=(1,)),
            Tensor(name="score", dtype=np.float64, shape=(1,)),
        ]
    else:
        function = infer
        names = ("input_ids", "attention_mask")
        inputs = [Tensor(name=name, dtype=np.int64, shape=(-1,)) for name in names]
        outputs = [Tensor(name="logits", dtype=np.float32, shape=(-1,))]
    with Triton(config=config, workspace=Path(sys.argv[4]) / "triton") as triton:
        triton.bind(
            model_name="model",
            infer_func=[function] * cores(),
            inputs=inputs,
            outputs=outputs,
            config=ModelConfig(
                max_batch_size=64, batcher=DynamicBatcher(max_queue_delay_microseconds=1000)
            ),
        )
        triton.serve()
