"""Infinity's batching engine around a classifier of one's own: batches of at most 64 texts.

Its command line serves architectures of transformers alone, so its engine is called from a FastAPI
application. It takes texts and no tensors.

BENCH_MODEL=bundles/languages/1 uvicorn on_infinity:app
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from infinity_emb.inference import BatchHandler
from infinity_emb.transformer.abstract import BaseClassifer
from onnx_model import open_model
from pydantic import BaseModel, Field


class Classifier(BaseClassifer):
    """The model, in the three steps that Infinity runs in threads of their own."""

    def __init__(self) -> None:
        self.model = open_model()

    def encode_pre(self, sentences: list[str]) -> Any:
        """The texts as they are: the model encodes and runs them together."""
        return sentences

    def encode_core(self, features: Any) -> Any:
        """The predictions of a batch."""
        return self.model.classify(features)

    def encode_post(self, embedding: Any) -> Any:
        """The predictions as they are."""
        return embedding

    def tokenize_lengths(self, sentences: list[str]) -> list[int]:
        """The lengths by which a batch is sorted."""
        return [len(sentence) for sentence in sentences]


class Texts(BaseModel):
    """Texts to classify."""

    inputs: list[str] = Field(min_length=1, max_length=256)


# Half the time of a run of the default model, as the documentation of `batch_delay` advises.
handler = BatchHandler([Classifier()], max_batch_size=64, batch_delay=0.0002)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Start and stop the engine with the application."""
    await handler.spawn()
    yield
    await handler.shutdown()


app = FastAPI(lifespan=lifespan)


@app.post("/v1/predict")
async def predict(request: Texts) -> dict[str, Any]:
    """Classify texts."""
    predictions, _ = await handler.classify(sentences=request.inputs)
    return {"predictions": predictions}
