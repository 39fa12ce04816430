"""BentoML: adaptive batching of at most 64 rows, a worker for each core.

BENCH_MODEL=bundles/languages/1 bentoml serve on_bentoml:Classifier
"""

from __future__ import annotations

from typing import Any

import bentoml
import numpy as np
from onnx_model import cores, open_model


@bentoml.service(workers=cores(), traffic={"timeout": 60})
class Classifier:
    """Texts {"inputs": [text]}, or {"rows": [{"input_ids": ids, "attention_mask": mask}]}."""

    def __init__(self) -> None:
        self.model = open_model()

    @bentoml.api(batchable=True, max_batch_size=64)
    def predict(self, inputs: list[str]) -> list[dict[str, Any]]:
        """The predictions of texts."""
        return self.model.classify(inputs)

    @bentoml.api(batchable=True, max_batch_size=64)
    def infer(self, rows: list[dict[str, list[int]]]) -> list[dict[str, list[float]]]:
        """The logits of rows."""
        ids = [np.array(row["input_ids"], np.int64) for row in rows]
        masks = [np.array(row["attention_mask"], np.int64) for row in rows]
        return [{"logits": row} for row in self.model.logits(ids, masks).tolist()]
