"""LitServe: a batch of at most 64 rows that is collected for at most 5 ms, a worker for each core.

BENCH_MODEL=bundles/languages/1 python on_litserve.py PORT
"""

from __future__ import annotations

import sys
from typing import Any

import litserve
import numpy as np
from onnx_model import cores, open_model


class Classifier(litserve.LitAPI):
    """Texts {"inputs": [text]}, or {"input_ids": [ids], "attention_mask": [mask]}."""

    def setup(self, device: str) -> None:
        """Open the model in this worker."""
        self.model = open_model()

    # LitServe reads the annotation: without one it passes the JSON of the body.
    def decode_request(self, request) -> Any:
        """One text, or the ids (T,) and the mask (T,) of one row."""
        if "inputs" in request:
            return request["inputs"][0]
        ids, mask = request["input_ids"][0], request["attention_mask"][0]
        return np.array(ids, np.int64), np.array(mask, np.int64)

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Rows of different lengths stay a list: the model pads them."""
        return inputs

    def predict(self, x: list[Any]) -> list[Any]:
        """The predictions of texts, or the logits of rows."""
        if isinstance(x[0], str):
            return [{"predictions": [prediction]} for prediction in self.model.classify(x)]
        rows, masks = zip(*x, strict=True)
        return [{"logits": [row]} for row in self.model.logits(rows, masks).tolist()]

    def unbatch(self, output: list[Any]) -> list[Any]:
        """The answers are separate already."""
        return output

    def encode_response(self, output: Any) -> Any:
        """The answer as it is."""
        return output


if __name__ == "__main__":
    api = Classifier(max_batch_size=64, batch_timeout=0.005)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=cores())
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)
