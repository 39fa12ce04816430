"""MLServer: a custom runtime, a worker for each core, adaptive batching where rows can be joined.

Its batching joins the tensors of requests along their first axis, so it suits texts, of shape [1].
Rows of ids have different lengths and cannot be joined.
"""

from __future__ import annotations

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse
from onnx_model import open_model


class Runtime(MLModel):
    """Texts as BYTES, or ids and masks as INT64."""

    async def load(self) -> bool:
        """Open the model in this worker."""
        self.model = open_model()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """The labels and scores of texts, or the logits of rows."""
        if self.model.labels:
            predictions = self.model.classify(StringCodec.decode_input(payload.inputs[0]))
            labels = [prediction["label"] for prediction in predictions]
            scores = np.array([[prediction["score"]] for prediction in predictions])
            outputs = [
                StringCodec.encode_output("label", labels),
                NumpyCodec.encode_output("score", scores),
            ]
        else:
            tensors = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
            logits = self.model.logits(tensors["input_ids"], tensors["attention_mask"])
            outputs = [NumpyCodec.encode_output("logits", logits)]
        return InferenceResponse(model_name=self.name, outputs=outputs)
