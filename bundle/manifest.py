"""The manifest of a bundle: its tensors, labels, front end, files and provenance.

It lists the sha256 of every other file except the certificate. So the sha256 of `manifest.json` is
the digest of the whole bundle. It holds no time, no path and no timing: the same training run gives
the same digest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    model_validator,
)

from evalmode.bundle.frontend import TOKENIZER_FILE, BpeSpec, FrontEndSpec

MODEL_FILE = "model.onnx"
MANIFEST_FILE = "manifest.json"
CERTIFICATE_FILE = "certificate.json"
KNOWN_ANSWERS_FILE = "known_answers.npz"

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# A name and a version are names of folders. So they must not lead out of the folder of bundles.
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, StringConstraints(pattern=_NAME)]


def is_name(text: str) -> bool:
    """Whether `text` can be the name or the version of a bundle."""
    return re.fullmatch(_NAME, text) is not None


def _require_inside(path: str) -> str:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", path) or ".." in PurePosixPath(path).parts:
        raise ValueError(
            f"a bundle's file must be a plain relative path inside the bundle, got {path!r}"
        )
    return path


FilePath = Annotated[str, AfterValidator(_require_inside)]


class Frozen(BaseModel):
    """A record of a bundle's JSON: immutable, and an unknown key is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def canonical(self) -> bytes:
        """The JSON of this record: the bytes that are written, hashed and compared."""
        return self.model_dump_json(indent=2).encode() + b"\n"


class PartOfAxis(Frozen):
    """The slice [start:stop] of an axis, as Python counts; without `stop` to the end."""

    axis: int = Field(ge=0)
    start: int
    stop: int | None = None


class Bound(Frozen):
    """The smallest and the largest value of an integer input that the model uses as an index.

    It holds for all elements of the input, or for those within every slice of `part`.
    """

    minimum: int | None = None
    maximum: int | None = None
    part: tuple[PartOfAxis, ...] = Field(default=(), exclude_if=lambda part: not part)

    @model_validator(mode="after")
    def _require_a_value(self) -> Bound:
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"no value is {self}")
        return self

    def __str__(self) -> str:
        limits = []
        if self.minimum is not None:
            limits.append(f"at least {self.minimum}")
        if self.maximum is not None:
            limits.append(f"at most {self.maximum}")
        return " and ".join(limits)


class TensorSpec(Frozen):
    """A tensor of the graph.

    Attributes:
        name: its name in the graph.
        datatype: its element type, by the name in the Open Inference Protocol.
        shape: its shape, with -1 for an axis that varies.
        bounds: the values that an integer input may have, where it is an index.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    bounds: tuple[Bound, ...] = Field(default=(), exclude_if=lambda bounds: not bounds)

    @model_validator(mode="after")
    def _require_fitting_bounds(self) -> TensorSpec:
        if self.bounds and not self.datatype.startswith(("INT", "UINT")):
            raise ValueError(f"bounds are for integers, and {self.name} is {self.datatype}")
        for bound in self.bounds:
            for part in bound.part:
                if part.axis >= len(self.shape):
                    raise ValueError(
                        f"bounds name axis {part.axis} of {self.name}, which has {len(self.shape)}"
                    )
        return self


class Manifest(Frozen):
    """What a service needs to answer, and where the bundle comes from.

    Version 2 of the schema added the bounds of inputs. A manifest without bounds is written as
    version 1, which earlier releases can read: `lowest_schema_version`.
    """

    schema_version: Literal[1, 2] = 2
    name: Name
    version: Name
    opset: int
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    labels: tuple[str, ...] | None = None
    frontend: FrontEndSpec | None = None
    metrics: dict[str, JsonValue] = Field(default_factory=dict)
    provenance: dict[str, JsonValue] = Field(default_factory=dict)
    files: dict[FilePath, Sha256]

    @model_validator(mode="after")
    def _require_files(self) -> Manifest:
        required = {MODEL_FILE}
        if isinstance(self.frontend, BpeSpec):
            required.add(TOKENIZER_FILE)
        missing = sorted(required - set(self.files))
        if missing:
            raise ValueError(f"files must list {', '.join(missing)}")
        return self

    @model_validator(mode="after")
    def _require_schema_version(self) -> Manifest:
        if self.schema_version < lowest_schema_version((*self.inputs, *self.outputs)):
            raise ValueError("schema_version 1 has no bounds of tensors: use 2")
        return self


def lowest_schema_version(tensors: Iterable[TensorSpec]) -> Literal[1, 2]:
    """The earliest version of the manifest's schema that can describe these tensors."""
    return 2 if any(tensor.bounds for tensor in tensors) else 1
