"""KServe's Python server: a custom predictor. It has no batching of its own.

BENCH_MODEL=bundles/languages/1 python on_kserve.py --http_port PORT
"""

from __future__ import annotations

import argparse

import kserve
import numpy as np
from kserve import InferOutput, InferRequest, InferResponse
from onnx_model import open_model


class Predictor(kserve.Model):
    """Texts as BYTES, or ids and masks as INT64."""

    def __init__(self) -> None:
        super().__init__("model")
        self.model = open_model()
        self.ready = True

    def predict(
        self, payload: InferRequest, headers: dict[str, str] | None = None, **_: object
    ) -> InferResponse:
        """The labels and scores of texts, or the logits of rows."""
        tensors = {tensor.name: tensor.as_numpy() for tensor in payload.inputs}
        if self.model.labels:
            texts = [text.decode() if isinstance(text, bytes) else text for text in tensors["text"]]
            predictions = self.model.classify(texts)
            labels = [prediction["label"] for prediction in predictions]
            scores = [prediction["score"] for prediction in predictions]
            outputs = [
                InferOutput("label", [len(labels)], "BYTES", data=labels),
                InferOutput("score", [len(scores)], "FP64", data=scores),
            ]
        else:
            logits = self.model.logits(list(tensors["input_ids"]), list(tensors["attention_mask"]))
            output = InferOutput("logits", list(logits.shape), "FP32")
            output.set_data_from_numpy(
                np.ascontiguousarray(logits), binary_data=payload.use_binary_outputs
            )
            outputs = [output]
        # KServe refuses an answer without an id.
        return InferResponse(
            payload.id or "0",
            self.name,
            outputs,
            use_binary_outputs=payload.use_binary_outputs,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(parents=[kserve.model_server.parser])
    arguments = parser.parse_args()
    kserve.ModelServer(http_port=arguments.http_port, enable_grpc=False).start([Predictor()])
