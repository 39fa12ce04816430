"""What the protocol says of a server and of a model, as pydantic records. Knows no model: it is
given its tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from evalmode.bundle.manifest import TensorSpec
from evalmode.service.protocol.datatypes import BYTES

PLATFORM = "onnx_onnxv1"
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_repository",
    "model_repository(unload_dependents)",
    "model_configuration",
    "statistics",
)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class ServerMetadata(_Record):
    """The server, and the extensions of the protocol that it speaks."""

    name: str = "evalmode"
    version: str
    extensions: tuple[str, ...] = EXTENSIONS


class ServerState(_Record):
    """Whether the server lives, and whether it can be asked."""

    live: bool
    ready: bool | None = None


class ModelState(_Record):
    """Whether a model can be asked."""

    name: str
    ready: bool = True


class ModelMetadata(_Record):
    """A model's tensors; a shape holds -1 where it varies. A text model takes either `text` or its
    graph's inputs.
    """

    name: str
    versions: tuple[str, ...] = Field(description="the versions that are served, newest first")
    platform: str = PLATFORM
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class IndexEntry(_Record):
    """A model version of the repository."""

    name: str
    version: str
    state: str
    reason: str = ""


class ModelStatistics(_Record):
    """Figures of model versions since the server began, as Triton's statistics extension writes
    them.
    """

    model_stats: tuple[dict[str, JsonValue], ...]


class ErrorBody(_Record):
    """Every answer of /v2 other than 200."""

    error: str = Field(description="one sentence")


class ConfiguredTensor(_Record):
    """A tensor as Triton's model configuration writes it: `dims` are a row's, without the number of
    rows.
    """

    name: str
    data_type: str
    dims: tuple[int, ...]


class ConfiguredInput(ConfiguredTensor):
    """An input; `optional` where a model takes either this or others."""

    optional: bool = False


class VersionPolicy(_Record):
    """How many of a model's newest versions are served."""

    latest: dict[Literal["num_versions"], int]


class ModelConfig(_Record):
    """A model configuration as Triton's clients read it."""

    name: str
    platform: Literal["onnxruntime_onnx"] = "onnxruntime_onnx"
    backend: Literal["onnxruntime"] = "onnxruntime"
    version_policy: VersionPolicy
    max_batch_size: int
    input: tuple[ConfiguredInput, ...]
    output: tuple[ConfiguredTensor, ...]
    dynamic_batching: dict[str, int] | None = Field(
        default=None, description="absent where rows are never batched"
    )
    parameters: dict[str, dict[Literal["string_value"], str]]


def model_config(
    *,
    name: str,
    digest: str,
    known_answers: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    alternatives: bool,
    batched: bool,
    versions: int,
    max_rows: int,
) -> ModelConfig:
    """The configuration of a model; `alternatives` where its inputs are several ways to ask it the
    same.

    A model that is not `batched` has a `max_batch_size` of 0 and, by Triton's rule, the rows among
    its dims.
    """

    def dims(spec: TensorSpec) -> tuple[int, ...]:
        return spec.shape[1:] if batched else spec.shape

    return ModelConfig(
        name=name,
        version_policy=VersionPolicy(latest={"num_versions": versions}),
        max_batch_size=max_rows if batched else 0,
        input=tuple(
            ConfiguredInput(
                name=spec.name,
                data_type=_data_type(spec.datatype),
                dims=dims(spec),
                optional=alternatives,
            )
            for spec in inputs
        ),
        output=tuple(
            ConfiguredTensor(name=spec.name, data_type=_data_type(spec.datatype), dims=dims(spec))
            for spec in outputs
        ),
        dynamic_batching={} if batched else None,
        parameters={
            "digest": {"string_value": digest},
            "known_answers": {"string_value": known_answers},
        },
    )


def _data_type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == BYTES else f"TYPE_{datatype}"
