"""Ray Serve: `serve.batch` of at most 64 rows within 5 ms, a replica for each core.

BENCH_MODEL=bundles/languages/1 python on_ray.py PORT FOLDER
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import ray
from onnx_model import cores, open_model
from ray import serve
from starlette.requests import Request


@serve.deployment(num_replicas=cores(), max_ongoing_requests=128)
class Classifier:
    """Texts {"inputs": [text]}, or {"input_ids": [ids], "attention_mask": [mask]}."""

    def __init__(self) -> None:
        self.model = open_model()

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.005)
    async def classify(self, texts: list[str]) -> list[dict[str, Any]]:
        """The predictions of texts."""
        return self.model.classify(texts)

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.005)
    async def infer(self, rows: list[tuple[np.ndarray, np.ndarray]]) -> list[list[float]]:
        """The logits of rows."""
        ids, masks = zip(*rows, strict=True)
        return self.model.logits(ids, masks).tolist()

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Answer one request."""
        body = await request.json()
        if "inputs" in body:
            return {"predictions": [await self.classify(body["inputs"][0])]}
        row = (
            np.array(body["input_ids"][0], np.int64),
            np.array(body["attention_mask"][0], np.int64),
        )
        return {"logits": [await self.infer(row)]}


if __name__ == "__main__":
    # Ray keeps sockets below this folder, whose paths may have at most 107 bytes.
    ray.init(num_cpus=cores(), include_dashboard=False, _temp_dir=sys.argv[2])
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Classifier.bind(), name="classifier", route_prefix="/", blocking=True)
