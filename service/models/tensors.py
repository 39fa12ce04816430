"""Raw tensors of one request: checked against what the model declares, split into rows, and the
rows' answers joined again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from evalmode.bundle.known_answers import Tensors, bits
from evalmode.bundle.manifest import Bound, TensorSpec
from evalmode.service.errors import BadRequest
from evalmode.service.protocol.datatypes import BYTES, DATATYPES, datatype_of

# The name of each input, and its shape without the rows. Rows share a batch only if it is the same.
RowShape: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]

_OBJECT_BYTES = 64  # of a Python string and the pointer to it, besides the characters


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelRow:
    """One row as the engine sees it: inputs with a leading dimension of 1 (or a whole request), and
    its real length.
    """

    inputs: Tensors
    tokens: int = 1

    @property
    def nbytes(self) -> int:
        """The bytes it holds while it waits."""
        return sum(map(_nbytes, self.inputs.values()))

    def digest(self) -> str:
        """The sha256 of its inputs."""
        return hashlib.sha256(content_of(self.inputs)).hexdigest()

    def description(self) -> str:
        """The digest and the shapes: enough to find the row again and to know how it was run."""
        shapes = " ".join(
            f"{name}{list(tensor.shape)}" for name, tensor in sorted(self.inputs.items())
        )
        return f"{self.digest()} {shapes}"


def content_of(tensors: Tensors) -> bytes:
    """Names, element types, shapes and every byte: two answers are the same when these are."""
    parts = []
    for name in sorted(tensors):
        tensor = tensors[name]
        parts += [f"{name} {tensor.dtype.str} {tensor.shape}\n".encode(), bits(tensor)]
    return b"".join(parts)


def check_inputs(
    inputs: Tensors, specs: Sequence[TensorSpec], *, optional: frozenset[str] = frozenset()
) -> dict[str, npt.NDArray[np.generic]]:
    """`inputs` as the runtime needs them. Raises BadRequest, naming the tensor, where they do not
    fit the model.
    """
    specs_by_name = {spec.name: spec for spec in specs}
    names = ", ".join(specs_by_name)
    for name in inputs:
        if name not in specs_by_name:
            raise BadRequest(f"the model has no input {name!r}: its inputs are {names}", field=name)
    for name in specs_by_name:
        if name not in inputs and name not in optional:
            raise BadRequest(
                f"input {name!r} is missing: the model's inputs are {names}", field=name
            )
    return {name: _check_input(tensor, specs_by_name[name]) for name, tensor in inputs.items()}


def row_count(inputs: Tensors) -> int:
    """The number of rows. Raises BadRequest when the inputs do not agree on it, or it is 0."""
    sizes: dict[str, int] = {name: tensor.shape[0] for name, tensor in inputs.items()}
    first, rows = next(iter(sizes.items()))
    for name, size in sizes.items():
        if size != rows:
            raise BadRequest(
                f"input {name!r} has {size} rows and {first!r} has {rows}: make them agree",
                field=name,
            )
    if rows == 0:
        raise BadRequest(f"input {first!r} has no rows: send at least one", field=first)
    return rows


def split(inputs: Tensors) -> list[dict[str, npt.NDArray[np.generic]]]:
    """Single rows with a leading dimension of 1: copies, so that no row keeps the whole request."""
    rows = row_count(inputs)
    if rows == 1:
        return [dict(inputs)]
    return [
        {name: tensor[row : row + 1].copy() for name, tensor in inputs.items()}
        for row in range(rows)
    ]


def row_shape_of(row: Tensors) -> RowShape:
    """The shapes of a row, without its leading dimension."""
    return tuple((name, row[name].shape[1:]) for name in sorted(row))


def label_of(row_shape: RowShape) -> str:
    """A row shape as people read it: `3x224x224`, of several inputs `8,8x2`."""
    return ",".join("x".join(map(str, shape)) or "1" for _, shape in row_shape)


def unknown_datatype(specs: Sequence[TensorSpec]) -> TensorSpec | None:
    """The first tensor of a type that requests cannot carry, like a sequence or bfloat16; None
    without any.
    """
    return next((spec for spec in specs if spec.datatype not in DATATYPES), None)


def non_finite_input(inputs: Tensors) -> str | None:
    """The first input that holds NaN or infinity; None where all are finite."""
    return next(
        (
            name
            for name, tensor in inputs.items()
            if tensor.dtype.kind == "f" and not np.isfinite(tensor).all()
        ),
        None,
    )


def _check_input(tensor: npt.NDArray[np.generic], spec: TensorSpec) -> npt.NDArray[np.generic]:
    if len(tensor.shape) != len(spec.shape) or any(
        expected not in (-1, size) for size, expected in zip(tensor.shape, spec.shape, strict=True)
    ):
        raise BadRequest(
            f"input {spec.name!r} must have the shape {[*spec.shape]} (-1: any), got"
            f" {[*tensor.shape]}",
            field=spec.name,
        )
    datatype = BYTES if tensor.dtype.kind in "OUS" else datatype_of(tensor)
    if datatype != spec.datatype:
        raise BadRequest(
            f"input {spec.name!r} must be {spec.datatype}, got {datatype}", field=spec.name
        )
    if spec.datatype == BYTES:
        return _strings(tensor, spec)
    for bound in spec.bounds:
        _require_bound(tensor, bound, spec.name)
    return np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("=")).reshape(tensor.shape)


def _require_bound(tensor: npt.NDArray[np.generic], bound: Bound, name: str) -> None:
    """Raise BadRequest for an index that the module would refuse too. The runtime counts a negative
    one from the other end.
    """
    places: list[slice] = [slice(None)] * tensor.ndim
    for part in bound.part:
        places[part.axis] = slice(part.start, part.stop)
    bounded = tensor[tuple(places)]
    if bounded.size == 0:
        return
    least, largest = int(bounded.min()), int(bounded.max())
    low, high = bound.minimum, bound.maximum
    if low is not None and least < low:
        value = least
    elif high is not None and largest > high:
        value = largest
    else:
        return
    first = np.argwhere(bounded == value)[0]
    starts = [place.indices(size)[0] for place, size in zip(places, tensor.shape, strict=True)]
    place = [int(index) + start for index, start in zip(first, starts, strict=True)]
    raise BadRequest(f"{name}{place} must be {bound}, got {value}", field=name)


def _strings(tensor: npt.NDArray[np.generic], spec: TensorSpec) -> npt.NDArray[np.generic]:
    strings = np.empty(tensor.size, dtype=object)
    for place, element in enumerate(tensor.flat):
        # Both ways: half an emoji is a str that cannot be encoded, and not all bytes are UTF-8.
        try:
            raw = element if isinstance(element, bytes) else str(element).encode()
            strings[place] = raw.decode()
        except UnicodeError as error:
            raise BadRequest(
                f"element {place} of input {spec.name!r} is not UTF-8", field=spec.name
            ) from error
    return strings.reshape(tensor.shape)


def _nbytes(tensor: npt.NDArray[np.generic]) -> int:
    if tensor.dtype.hasobject:
        return sum(len(str(element)) + _OBJECT_BYTES for element in tensor.flat)
    return int(tensor.nbytes)


def join_rows(
    answers: Sequence[Tensors], names: Sequence[str]
) -> dict[str, npt.NDArray[np.generic]]:
    """The answers of a request's rows as one tensor an output. Raises BadRequest where rows differ
    in shape.
    """
    outputs = {}
    for name in names:
        rows = [answer[name] for answer in answers]
        if len({row.shape[1:] for row in rows}) > 1:
            raise BadRequest(
                f"the rows of this request give output {name!r} different shapes,"
                f" {[*rows[0].shape[1:]]} and others: send rows of different lengths one by one, or"
                " leave this output out",
                field=name,
            )
        outputs[name] = rows[0] if len(rows) == 1 else np.concatenate(rows)
    return outputs
