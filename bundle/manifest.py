"""What a bundle declares: tensors, labels, front end, files and their sha256, provenance. Knows no
files itself.

The manifest is the bundle's root: it lists the sha256 of every other file (but the certificate), so
the sha256 of `manifest.json` is the digest of the whole. No clock, path or timing stands in it: the
same training run gives the same digest.
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
# A name and a version are a folder each: nothing that could climb out of the bundle root.
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, StringConstraints(pattern=_NAME)]


def is_name(text: str) -> bool:
    """Whether a bundle, or a version of one, may be called `text`."""
    return re.fullmatch(_NAME, text) is not None


def _inside(path: str) -> str:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", path) or ".." in PurePosixPath(path).parts:
        raise ValueError(
            f"a bundle's file must be a plain relative path inside the bundle, got {path!r}"
        )
    return path


FilePath = Annotated[str, AfterValidator(_inside)]


class Frozen(BaseModel):
    """A record that is read from and written to a bundle: immutable, and no key that it does not
    know.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def canonical(self) -> bytes:
        """The one spelling of this record as JSON: what is written, hashed and compared byte for
        byte.
        """
        return self.model_dump_json(indent=2).encode() + b"\n"


class PartOfAxis(Frozen):
    """The places [start, stop) of an axis, counted as Python does; without `stop` to the end."""

    axis: int = Field(ge=0)
    start: int
    stop: int | None = None


class Bound(Frozen):
    """The least and the largest value that an integer input may hold, since it is an index there.

    Without `part` this is said of all its places, else of those in the parts of all axes named.
    """

    minimum: int | None = None
    maximum: int | None = None
    part: tuple[PartOfAxis, ...] = Field(default=(), exclude_if=lambda part: not part)

    @model_validator(mode="after")
    def _can_be_met(self) -> Bound:
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"no value is {self}")
        return self

    def __str__(self) -> str:
        limits = [f"at least {self.minimum}"] if self.minimum is not None else []
        limits += [f"at most {self.maximum}"] if self.maximum is not None else []
        return " and ".join(limits)


class TensorSpec(Frozen):
    """A tensor of the graph: its name, Open Inference Protocol datatype, and shape with -1 where it
    varies. `bounds` are those of an integer input whose values are indices.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    bounds: tuple[Bound, ...] = Field(default=(), exclude_if=lambda bounds: not bounds)

    @model_validator(mode="after")
    def _bounds_fit(self) -> TensorSpec:
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
    """Everything a service must know to answer from a bundle, and everything a reader may ask about
    its origin.

    Version 2 of the schema added the bounds of inputs. A manifest without any is still written as
    version 1, which earlier releases read: `lowest_schema_version`.
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
    def _files_are_listed(self) -> Manifest:
        needed = {MODEL_FILE} | ({TOKENIZER_FILE} if isinstance(self.frontend, BpeSpec) else set())
        if missing := sorted(needed - set(self.files)):
            raise ValueError(f"files must list {', '.join(missing)}")
        return self

    @model_validator(mode="after")
    def _version_can_hold_it(self) -> Manifest:
        if self.schema_version < lowest_schema_version((*self.inputs, *self.outputs)):
            raise ValueError("schema_version 1 knows no bounds of tensors")
        return self


def lowest_schema_version(tensors: Iterable[TensorSpec]) -> Literal[1, 2]:
    """The earliest version of the schema that can hold these tensors."""
    return 2 if any(tensor.bounds for tensor in tensors) else 1
