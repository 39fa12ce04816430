"""The protocol's responses about a server and its models, as pydantic records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from evalmode.bundle.manifest import TensorSpec
from evalmode.service.protocol.datatypes import BYTES

# The name of ONNX models among the platforms that the protocol lists.
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
    """The server, and the extensions of the protocol that it implements."""

    name: str = "evalmode"
    version: str
    extensions: tuple[str, ...] = EXTENSIONS


class ServerState(_Record):
    """Whether the process is healthy, and whether it is ready for requests; null if not queried."""

    live: bool
    ready: bool | None = None


class ModelState(_Record):
    """Whether a model is ready for requests."""

    name: str
    ready: bool = True


class ModelMetadata(_Record):
    """A model's tensors, with -1 for a dimension that varies.

    A text model takes either its first input, `text`, or all the others.
    """

    name: str
    versions: tuple[str, ...] = Field(description="the versions that are served, newest first")
    platform: str = PLATFORM
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class IndexEntry(_Record):
    """One version of a model in the repository, and its state."""

    name: str
    version: str
    state: str
    reason: str = ""


class ModelStatistics(_Record):
    """Counts and times of model versions since the start of the server.

    The form is that of Triton's statistics extension.
    """

    model_stats: tuple[dict[str, JsonValue], ...]


class ErrorBody(_Record):
    """The body of every response of /v2 other than 200."""

    error: str = Field(description="one sentence")


class ConfiguredTensor(_Record):
    """A tensor of Triton's model configuration; `dims` leaves the dimension of rows out."""

    name: str
    data_type: str
    dims: tuple[int, ...]


class ConfiguredInput(ConfiguredTensor):
    """An input; it is `optional` if a model takes either this one or others."""

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
    are_inputs_optional: bool,
    is_batched: bool,
    versions: int,
    max_rows: int,
) -> ModelConfig:
    """The configuration of a model, as Triton's clients read it.

    A model that is not batched has a `max_batch_size` of 0. Triton's rule is that its `dims` then
    contain the dimension of rows.
    """
    config_inputs = [
        ConfiguredInput(
            name=spec.name,
            data_type=_triton_type(spec.datatype),
            dims=spec.shape[1:] if is_batched else spec.shape,
            optional=are_inputs_optional,
        )
        for spec in inputs
    ]
    config_outputs = [
        ConfiguredTensor(
            name=spec.name,
            data_type=_triton_type(spec.datatype),
            dims=spec.shape[1:] if is_batched else spec.shape,
        )
        for spec in outputs
    ]
    return ModelConfig(
        name=name,
        version_policy=VersionPolicy(latest={"num_versions": versions}),
        max_batch_size=max_rows if is_batched else 0,
        input=tuple(config_inputs),
        output=tuple(config_outputs),
        # Present and empty: rows are batched, and Triton's options for it do not apply here.
        dynamic_batching={} if is_batched else None,
        parameters={
            "digest": {"string_value": digest},
            "known_answers": {"string_value": known_answers},
        },
    )


def _triton_type(datatype: str) -> str:
    """The name of a datatype in Triton's configuration, which calls BYTES a string."""
    return "TYPE_STRING" if datatype == BYTES else f"TYPE_{datatype}"
