"""The requests and responses of /v1, as pydantic models; OpenAPI shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, JsonValue
from pydantic_core import to_json

from evalmode import DEFAULT_TOP_K
from evalmode.bundle.certificate import Certificate, Platform
from evalmode.bundle.known_answers import Replay
from evalmode.bundle.manifest import Manifest
from evalmode.service.models.model import Model
from evalmode.service.models.text import Prediction
from evalmode.service.ndjson import prediction_record

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

    # InstanceOf, because pydantic's `str` refuses half an emoji. It is valid JSON, and front ends
    # encode it like any other text.
    inputs: list[InstanceOf[str]] = Field(min_length=1, description="The texts; each may be empty.")
    # The largest `top_k` is a setting of the server, `max_top_k`, and the most `inputs` are
    # `max_rows`. `request_schema` below states both in OpenAPI. v1_request.py refuses more.
    top_k: int = Field(
        default=DEFAULT_TOP_K,
        ge=1,
        description="How many labels to return, best first; at most all of the model's.",
    )
    model: str | None = Field(default=None, description="The model; needed if there are several.")
    version: str | None = Field(
        default=None, description="The version of the model; by default the newest."
    )
    truncate: bool = Field(
        default=True,
        description=("Cut a text that is longer than the model reads; false refuses it with 422."),
    )


class ModelReference(_Response):
    """The model that answered; the digest identifies every byte of its bundle."""

    name: str
    version: str
    digest: str

    @classmethod
    def of(cls, model: Model) -> ModelReference:
        """The reference to this model."""
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


class PredictResponse(_Response):
    """One prediction for each text, in the order of the request."""

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


def predict_json(model: Model, predictions: Sequence[Prediction]) -> bytes:
    """The JSON of a `PredictResponse` with these predictions of `model`.

    Its values are ours, so they need no validation, which would take longer than the scores.
    """
    records = [prediction_record(prediction) for prediction in predictions]
    reference = {"name": model.name, "version": model.version, "digest": model.digest}
    return to_json({"model": reference, "predictions": records})


class ModelResponse(_Response):
    """A model that is served, what was proved of it, and where it runs."""

    name: str
    version: str
    digest: str
    manifest: Manifest
    certificate: Certificate | None = Field(
        description="null for an uncertified bundle, if the server allows it"
    )
    determinism: Literal["proved everywhere", "measured here"] = Field(
        description=(
            "why an answer never changes by a bit: the certificate proves that nothing in the graph"
            " rounds, so the bits are the same on every machine; or this server measured at which"
            " row counts a row keeps its bits"
        )
    )
    known_answers: Replay | None = Field(
        description="how the bundle's known answers compared on this machine"
    )
    platform: Platform
    provider: str
    threads: int = Field(description="threads of one batch")
    parallel: int = Field(description="batches that run at once, in each worker")
    workers: int = Field(description="server processes")
    row_counts: dict[str, list[int]] = Field(
        description=(
            "for each bucket, the row counts of its batches: at these a row was measured to get the"
            " same bits as alone, and they are faster than smaller batches"
        )
    )

    @classmethod
    def of(cls, model: Model, *, parallel: int, workers: int) -> ModelResponse:
        """The description of `model` on a server of `workers` processes."""
        certificate = model.bundle.certificate
        is_exact = certificate is not None and certificate.is_exact
        return cls(
            **dict(ModelReference.of(model)),
            manifest=model.bundle.manifest,
            certificate=certificate,
            determinism="proved everywhere" if is_exact else "measured here",
            known_answers=model.replayed,
            platform=model.platform,
            provider=model.platform.provider,
            threads=model.platform.threads,
            parallel=parallel,
            workers=workers,
            row_counts={bucket.label: sorted(bucket.costs) for bucket in model.buckets},
        )


class ErrorResponse(_Response):
    """The body of every response other than 200."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"error": "inputs.3 must be a string, got 17", "field": "inputs.3"}]
        }
    )

    error: str = Field(description="one sentence")
    field: str | None = Field(description="the field that is wrong; null if it is none")


def request_schema(*, max_rows: int, max_top_k: int) -> dict[str, JsonValue]:
    """The JSON schema of PredictRequest, with the limits of this server."""
    schema: dict[str, Any] = PredictRequest.model_json_schema()
    schema["properties"]["inputs"]["maxItems"] = max_rows
    schema["properties"]["top_k"]["maximum"] = max_top_k
    return schema


def query_schema(body: dict[str, JsonValue]) -> list[JsonValue]:
    """The parameters of the query, as OpenAPI lists them: all fields of `body` but the texts."""
    properties: Any = body["properties"]
    parameters: list[JsonValue] = []
    for name, field in properties.items():
        if name == "inputs":
            continue
        # In a query a missing parameter has no value, so `null` and the default are left out.
        schema = {key: field[key] for key in ("minimum", "maximum") if key in field}
        schema["type"] = field.get("type", "string")
        parameters.append(
            {
                "name": name,
                "in": "query",
                "required": False,
                "description": f"{field['description']} In the query or in a JSON body, not both.",
                "schema": schema,
            }
        )
    return parameters
