"""What requests and responses look like on the wire, as OpenAPI shows them. Knows no framework and
no status.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, JsonValue

from evalmode.bundle.certificate import Certificate, Platform
from evalmode.bundle.known_answers import Replay
from evalmode.bundle.manifest import Manifest
from evalmode.service.models.model import Model
from evalmode.service.models.text import Prediction

DEFAULT_TOP_K = 3

_REQUEST: JsonValue = {
    "inputs": ["Ez egy rövid mondat.", "Dit is een zin."],
    "top_k": 3,
    "truncate": True,
}
_MODEL: JsonValue = {"name": "languages", "version": "1", "digest": "0f3c" * 16}
_TOP: JsonValue = [
    {"label": "hu", "score": 0.9921875},
    {"label": "fi", "score": 0.00390625},
    {"label": "et", "score": 0.001953125},
]


class _Response(BaseModel):
    model_config = ConfigDict(frozen=True)


class PredictRequest(BaseModel):
    """Texts to classify."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, json_schema_extra={"examples": [_REQUEST]}
    )

    # InstanceOf: a text that ends in half an emoji is valid JSON and the front end reads it;
    # pydantic's str does not.
    inputs: list[InstanceOf[str]] = Field(min_length=1, description="The texts; each may be empty.")
    top_k: int = Field(
        default=DEFAULT_TOP_K,
        ge=1,
        description="How many labels to give, best first; a model with fewer gives all of them.",
    )
    model: str | None = Field(
        default=None, description="Which model answers; needed where there are several."
    )
    version: str | None = Field(
        default=None, description="Which version of it; by default the newest."
    )
    truncate: bool = Field(
        default=True,
        description=(
            "Cut a text that is longer than the model reads, or refuse the request with 422."
        ),
    )


class ModelReference(_Response):
    """Which model answered: the digest names every byte of it."""

    name: str
    version: str
    digest: str

    @classmethod
    def of(cls, model: Model) -> ModelReference:
        """What this model is called."""
        return cls(name=model.name, version=model.version, digest=model.digest)


class ScoredLabel(_Response):
    """A label with its probability."""

    label: str
    score: float


class TextPrediction(_Response):
    """The prediction of one text."""

    label: str
    score: float
    truncated: bool = Field(
        description="Whether the text was longer than the model reads, and was cut."
    )
    top: list[ScoredLabel]

    @classmethod
    def of(cls, prediction: Prediction) -> TextPrediction:
        """The prediction as it is written."""
        return cls(
            label=prediction.label,
            score=prediction.score,
            truncated=prediction.truncated,
            top=[ScoredLabel(label=scored.label, score=scored.score) for scored in prediction.top],
        )


class PredictResponse(_Response):
    """One prediction for each text, in their order."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": _MODEL,
                    "predictions": [
                        {"label": "hu", "score": 0.9921875, "truncated": False, "top": _TOP}
                    ],
                }
            ]
        }
    )

    model: ModelReference
    predictions: list[TextPrediction]

    @classmethod
    def of(cls, model: Model, predictions: Sequence[Prediction]) -> PredictResponse:
        """The response to a request that this model answered so."""
        return cls(
            model=ModelReference.of(model),
            predictions=[TextPrediction.of(prediction) for prediction in predictions],
        )


class ModelResponse(_Response):
    """What is being served, what was proven of it, and where."""

    name: str
    version: str
    digest: str
    manifest: Manifest
    certificate: Certificate | None = Field(
        description="null where an uncertified bundle was allowed"
    )
    known_answers: Replay | None = Field(
        description="how the bundle's known answers came out on this machine"
    )
    platform: Platform
    provider: str
    threads: int = Field(description="threads of one batch")
    parallel: int = Field(description="batches that run at once, in each worker")
    workers: int = Field(description="server processes")
    row_counts: dict[str, list[int]] = Field(
        description=(
            "for each bucket of rows, the batch sizes that were measured here to give a row the"
            " bits it has alone, as far as they are worth their time"
        )
    )

    @classmethod
    def of(cls, model: Model, *, parallel: int, workers: int) -> ModelResponse:
        """Everything there is to say of a model and of the server that answers with it."""
        return cls(
            **dict(ModelReference.of(model)),
            manifest=model.bundle.manifest,
            certificate=model.bundle.certificate,
            known_answers=model.replayed,
            platform=model.platform,
            provider=model.platform.provider,
            threads=model.platform.threads,
            parallel=parallel,
            workers=workers,
            row_counts={bucket.label: sorted(bucket.costs) for bucket in model.buckets},
        )


class ErrorResponse(_Response):
    """Every answer other than 200."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"error": "inputs.3 must be a string, got 17", "field": "inputs.3"}]
        }
    )

    error: str = Field(description="one sentence")
    field: str | None = Field(description="the field of the request that is at fault, if it is one")


def request_schema(*, max_rows: int, max_top_k: int) -> dict[str, JsonValue]:
    """The JSON schema of PredictRequest with this server's limits in it."""
    schema: dict[str, Any] = PredictRequest.model_json_schema()
    schema["properties"]["inputs"]["maxItems"] = max_rows
    schema["properties"]["top_k"]["maximum"] = max_top_k
    return schema


def query_schema(body: dict[str, JsonValue]) -> list[JsonValue]:
    """The query's parameters: the fields of the body's schema that hold one value each."""
    properties: Any = body["properties"]
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": f"{schema['description']} In the query or in a JSON body, not in both.",
            "schema": {key: schema[key] for key in ("minimum", "maximum") if key in schema}
            | {"type": schema.get("type", "string")},
        }
        for name, schema in properties.items()
        if name != "inputs"
    ]
