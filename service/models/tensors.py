"""The raw tensors of a request: checked against what the model declares, split into rows, and the
answers of the rows joined again.
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
from evalmode.service.protocol.datatypes import BYTES, DATATYPES, DTYPES, datatype_of

# The name of each input, and its shape without the rows. Only rows of one shape share a batch.
RowShape: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]

# Bytes of a Python string and of the pointer to it, besides its characters.
_STRING_BYTES = 64


@dataclass(slots=True, kw_only=True, eq=False)
class ModelRow:
    """One row as the engine sees it.

    Attributes:
        inputs: its tensors with a leading dimension of 1, or those of a whole request.
        tokens: its length without padding.
    """

    inputs: Tensors
    tokens: int = 1

    @property
    def nbytes(self) -> int:
        """The bytes it holds while it waits."""
        nbytes = 0
        for tensor in self.inputs.values():
            # An array of strings counts only its pointers in `nbytes`.
            if tensor.dtype.hasobject:
                nbytes += sum(len(str(element)) + _STRING_BYTES for element in tensor.flat)
            else:
                nbytes += tensor.nbytes
        return nbytes

    def digest(self) -> str:
        """The sha256 of its inputs."""
        return hashlib.sha256(content_of(self.inputs)).hexdigest()

    def description(self) -> str:
        """The digest and the shapes: enough to identify the row and to know how it was run."""
        shapes = " ".join(
            f"{name}{list(tensor.shape)}" for name, tensor in sorted(self.inputs.items())
        )
        return f"{self.digest()} {shapes}"


def content_of(tensors: Tensors) -> bytes:
    """Names, element types, shapes and all bytes. Two answers are equal if these are."""
    parts = []
    for name in sorted(tensors):
        tensor = tensors[name]
        parts += [f"{name} {tensor.dtype.str} {tensor.shape}\n".encode(), bits(tensor)]
    return b"".join(parts)


def check_inputs(
    inputs: Tensors, specs: Sequence[TensorSpec], *, optional: frozenset[str] = frozenset()
) -> dict[str, npt.NDArray[np.generic]]:
    """`inputs` in the form that the runtime needs. An input in `optional` may be missing.

    Raises BadRequest, with the name of the tensor, if they do not fit the model. Checked in this
    order: the names, the number of dimensions and their sizes, the element type, the bounds.
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

    checked: dict[str, npt.NDArray[np.generic]] = {}
    for name, tensor in inputs.items():
        spec = specs_by_name[name]
        has_shape = len(tensor.shape) == len(spec.shape)
        # A declared size of -1 allows any size.
        for size, expected in zip(tensor.shape, spec.shape, strict=False):
            if expected not in (-1, size):
                has_shape = False
        if not has_shape:
            raise BadRequest(
                f"input {name!r} must have the shape {[*spec.shape]} (-1: any), got"
                f" {[*tensor.shape]}",
                field=name,
            )
        if tensor.dtype != DTYPES.get(spec.datatype):
            # Strings arrive as Python objects, bytes or characters; the protocol calls all BYTES.
            datatype = BYTES if tensor.dtype.kind in "OUS" else datatype_of(tensor)
            if datatype != spec.datatype:
                raise BadRequest(
                    f"input {name!r} must be {spec.datatype}, got {datatype}", field=name
                )
        if spec.datatype == BYTES:
            strings = np.empty(tensor.size, dtype=object)
            for index, element in enumerate(tensor.flat):
                # A str is encoded too: half of a surrogate pair is a str that has no UTF-8.
                try:
                    utf8 = element if isinstance(element, bytes) else str(element).encode()
                    strings[index] = utf8.decode()
                except UnicodeError as error:
                    raise BadRequest(
                        f"element {index} of input {name!r} is not UTF-8", field=name
                    ) from error
            checked[name] = strings.reshape(tensor.shape)
            continue

        for bound in spec.bounds:
            _require_bound(tensor, bound, name)
        if not (tensor.flags.c_contiguous and tensor.dtype.isnative):
            # The reshape restores a shape of (), which NumPy's ascontiguousarray makes (1,).
            native = tensor.dtype.newbyteorder("=")
            tensor = np.ascontiguousarray(tensor, dtype=native).reshape(tensor.shape)
        checked[name] = tensor
    return checked


def row_count(inputs: Tensors) -> int:
    """The number of rows. Raises BadRequest if the inputs do not agree on it, or if it is 0."""
    first = next(iter(inputs))
    rows: int = inputs[first].shape[0]
    for name, tensor in inputs.items():
        if tensor.shape[0] != rows:
            raise BadRequest(
                f"input {name!r} has {tensor.shape[0]} rows and {first!r} has {rows}: make them"
                " agree",
                field=name,
            )
    if rows == 0:
        raise BadRequest(f"input {first!r} has no rows: send at least one", field=first)
    return rows


def split_rows(tensors: Tensors, rows: int) -> list[dict[str, npt.NDArray[np.generic]]]:
    """The single rows of tensors with `rows` rows, each with a leading dimension of 1.

    They are copies: a view of one row would keep all of the others in memory.
    """
    if rows == 1:
        return [dict(tensors)]
    return [
        {name: tensor[row : row + 1].copy() for name, tensor in tensors.items()}
        for row in range(rows)
    ]


def join_rows(
    answers: Sequence[Tensors], names: Sequence[str]
) -> dict[str, npt.NDArray[np.generic]]:
    """The answers of a request's rows, as one tensor for each of the outputs `names`.

    Raises BadRequest if the rows give an output different shapes.
    """
    if len(answers) == 1:
        return {name: answers[0][name] for name in names}
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
        outputs[name] = np.concatenate(rows)
    return outputs


def row_shape_of(row: Tensors) -> RowShape:
    """The shapes of a row, without its leading dimension."""
    return tuple((name, row[name].shape[1:]) for name in sorted(row))


def label_of(row_shape: RowShape) -> str:
    """A row shape in a readable form: `3x224x224`, or `8,8x2` for several inputs."""
    return ",".join("x".join(map(str, shape)) or "1" for _, shape in row_shape)


def unknown_datatype(specs: Sequence[TensorSpec]) -> TensorSpec | None:
    """The first tensor of a type that requests cannot carry, such as a sequence or bfloat16; None
    if there is none.
    """
    return next((spec for spec in specs if spec.datatype not in DATATYPES), None)


def non_finite_input(inputs: Tensors) -> str | None:
    """The name of the first input that holds NaN or infinity; None if all are finite."""
    for name, tensor in inputs.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            return name
    return None


def _require_bound(tensor: npt.NDArray[np.generic], bound: Bound, name: str) -> None:
    """Raise BadRequest for an index that the PyTorch module would refuse too.

    ONNX Runtime would not refuse a negative index: it counts it from the other end.
    """
    slices: list[slice] = []
    bounded = tensor
    if bound.part:
        slices = [slice(None)] * tensor.ndim
        for part in bound.part:
            slices[part.axis] = slice(part.start, part.stop)
        bounded = tensor[tuple(slices)]
    if bounded.size == 0:
        return
    smallest, largest = int(bounded.min()), int(bounded.max())
    if bound.minimum is not None and smallest < bound.minimum:
        value = smallest
    elif bound.maximum is not None and largest > bound.maximum:
        value = largest
    else:
        return

    # The index of the first such value, counted in the whole tensor and not in its bounded part.
    index = []
    for axis, index_in_part in enumerate(np.argwhere(bounded == value)[0]):
        start = slices[axis].indices(tensor.shape[axis])[0] if slices else 0
        index.append(start + int(index_in_part))
    raise BadRequest(f"{name}{index} must be {bound}, got {value}", field=name)
