"""FastAPI, pydantic and ONNX Runtime, as most teams write it: sync handlers in the thread pool.

BENCH_MODEL=bundles/languages/1 uvicorn on_plain:app
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from fastapi import FastAPI
from onnx_model import open_model
from pydantic import BaseModel, Field

model = open_model()
app = FastAPI()


class Texts(BaseModel):
    """Texts to classify."""

    inputs: list[str] = Field(min_length=1, max_length=256)


class ScoredLabel(BaseModel):
    """A label with its probability."""

    label: str
    score: float


class Prediction(ScoredLabel):
    """The prediction of one text."""

    top: list[ScoredLabel]


class Predictions(BaseModel):
    """The predictions of the texts, in their order."""

    predictions: list[Prediction]


class InputTensor(BaseModel):
    """Ids or a mask, row after row."""

    name: Literal["input_ids", "attention_mask"]
    shape: tuple[int, int]
    datatype: Literal["INT64"]
    data: list[int]


class InferRequest(BaseModel):
    """Tensors of the Open Inference Protocol."""

    inputs: list[InputTensor] = Field(min_length=2, max_length=2)


class OutputTensor(BaseModel):
    """Logits, row after row."""

    name: str
    shape: list[int]
    datatype: str
    data: list[float]


class InferResponse(BaseModel):
    """The answer of the Open Inference Protocol."""

    model_name: str
    outputs: list[OutputTensor]


@app.post("/v1/predict")
def predict(request: Texts) -> Predictions:
    """Classify texts."""
    return Predictions.model_validate({"predictions": model.classify(request.inputs)})


@app.post("/v2/models/{name}/infer")
def infer(name: str, request: InferRequest) -> InferResponse:
    """Run the model on tensors."""
    tensors = {
        tensor.name: np.array(tensor.data, np.int64).reshape(tensor.shape)
        for tensor in request.inputs
    }
    logits = model.logits(list(tensors["input_ids"]), list(tensors["attention_mask"]))
    output = OutputTensor(
        name="logits", shape=list(logits.shape), datatype="FP32", data=logits.ravel().tolist()
    )
    return InferResponse(model_name=name, outputs=[output])
