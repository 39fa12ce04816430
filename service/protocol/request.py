"""An inference request: from a body's bytes to named tensors, or to the sentence that says what is
wrong with it.

A body is JSON, or JSON with raw tensors behind it (the header `Inference-Header-Content-Length`
says where they begin), or the raw bytes of a model's only input. Knows no model: which names and
shapes one takes is not checked here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from evalmode.bundle.manifest import TensorSpec
from evalmode.service.errors import BadRequest
from evalmode.service.protocol.binary import array_from_bytes
from evalmode.service.protocol.datatypes import (
    BYTES,
    DATATYPES,
    DTYPES,
    Array,
    array_from_values,
)
from evalmode.service.protocol.fields import (
    flag,
    integer,
    listed,
    name_of,
    parameters_of,
    parse_object,
    require_known,
    require_no_misspelt,
    shown_field,
)
from evalmode.service.strict_json import shown_flat, whole_number

JSON_LENGTH_HEADER = "inference-header-content-length"

_REQUEST_FIELDS = ("id", "parameters", "inputs", "outputs")
_INPUT_FIELDS = ("name", "shape", "datatype", "parameters", "data")
_OUTPUT_FIELDS = ("name", "parameters")
_MOST_DIMENSIONS = 32
_LONGEST_DIMENSION = 2**31 - 1
_LONGEST_TIMEOUT_US = 2**63 - 1
_MICROSECONDS = 1_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class InputTensor:
    """One input: `data` has the shape `shape`; its elements are `str` (out of JSON) or `bytes`
    where they are BYTES.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Array
    field: str


@dataclass(frozen=True, kw_only=True)
class AskedOutput:
    """One output that a request names, and how it is to be written; `classes` asks for that many
    best classes of it.
    """

    name: str
    binary: bool
    classes: int | None
    field: str


@dataclass(frozen=True, kw_only=True, eq=False)
class InferRequest:
    """A request for an inference. No `outputs` means all that there are, written as `binary_output`
    says.
    """

    id: str | None = None
    inputs: tuple[InputTensor, ...]
    outputs: tuple[AskedOutput, ...] = ()
    binary_output: bool = False
    truncate: bool = True
    timeout_s: float | None = None


def parse_infer(
    body: bytes,
    *,
    json_length: str | None = None,
    max_top_k: int,
    only_input: TensorSpec | None = None,
) -> InferRequest:
    """The request in `body`; `json_length` is the header, `only_input` what a raw body fills in a
    model of one input.

    Raises BadRequest, naming the field and its value. No size in the body is believed before it is
    held against what is there.
    """
    length = _json_length(json_length, body_bytes=len(body))
    if length == 0:
        return _raw_request(memoryview(body), only_input)
    found = parse_object(body[:length])
    require_no_misspelt(found, _REQUEST_FIELDS)
    request_id = found.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise BadRequest(f"id must be a string, got {shown_flat(request_id)}", field="id")
    parameters = parameters_of(found, field="parameters")
    timeout_us = integer(
        parameters, "timeout", lowest=0, highest=_LONGEST_TIMEOUT_US, field="parameters"
    )
    binary_output = flag(parameters, "binary_data_output", default=False, field="parameters")
    return InferRequest(
        id=request_id,
        inputs=_inputs(found, memoryview(body)[length:]),
        outputs=_outputs(found, binary_output=binary_output, max_top_k=max_top_k),
        binary_output=binary_output,
        truncate=flag(parameters, "truncate", default=True, field="parameters"),
        # 0 is how Triton's clients write none
        timeout_s=(timeout_us / _MICROSECONDS if timeout_us else None),
    )


def _json_length(header: str | None, *, body_bytes: int) -> int:
    if header is None:
        return max(body_bytes, 1)  # an empty body is bad JSON, and no raw tensor
    length = whole_number(header)
    if length is None or length > body_bytes:
        raise BadRequest(
            f"header {JSON_LENGTH_HEADER} must be the length of the JSON in the body of"
            f" {body_bytes} bytes, got {shown_flat(header)}",
            field=JSON_LENGTH_HEADER,
        )
    return length


def _raw_request(raw: memoryview, spec: TensorSpec | None) -> InferRequest:
    """The whole body as the only input of a model, whose shape the number of bytes decides."""
    if spec is None:
        raise BadRequest(
            f"a raw body ({JSON_LENGTH_HEADER}: 0) needs a model of one input, and this one has"
            " several: send JSON",
            field=JSON_LENGTH_HEADER,
        )
    field = f"inputs.{spec.name}"
    if spec.datatype == BYTES:  # one element, and no length before it
        shape = (1,) * len(spec.shape)
        data = np.array([raw.tobytes()], dtype=object)
    else:
        shape = _raw_shape(spec, len(raw), field=field)
        data = array_from_bytes(raw, spec.datatype, math.prod(shape), field=field)
    tensor = InputTensor(
        name=spec.name, datatype=spec.datatype, shape=shape, data=data.reshape(shape), field=field
    )
    return InferRequest(inputs=(tensor,), binary_output=True)


def _raw_shape(spec: TensorSpec, raw_bytes: int, *, field: str) -> tuple[int, ...]:
    """The shape with the one dimension that varies filled in; where a second one does, the first is
    one row.
    """
    shape = list(spec.shape)
    if shape.count(-1) > 1 and shape[0] == -1:
        shape[0] = 1
    if shape.count(-1) > 1:
        raise BadRequest(
            f"{field} has more dimensions that vary than a raw body can decide: send JSON",
            field=field,
        )
    if -1 in shape:
        row_bytes = math.prod(size for size in shape if size != -1) * DTYPES[spec.datatype].itemsize
        shape[shape.index(-1)] = max(1, raw_bytes // max(1, row_bytes))
    return tuple(shape)


def _inputs(found: dict[str, Any], raw: memoryview) -> tuple[InputTensor, ...]:
    entries = listed(found, "inputs")
    if not entries:
        raise BadRequest("inputs must hold at least 1 tensor", field="inputs")
    tensors: list[InputTensor] = []
    names: set[str] = set()
    place = 0
    for index, entry in enumerate(entries):
        field = f"inputs.{index}"
        name = name_of(entry, names, field=field)
        require_known(entry, _INPUT_FIELDS, field=field)
        parameters = parameters_of(entry, field=f"{field}.parameters")
        rest = len(raw) - place
        size = integer(
            parameters, "binary_data_size", lowest=0, highest=rest, field=f"{field}.parameters"
        )
        taken = None if size is None else raw[place : place + size]
        place += size or 0
        tensors.append(_input(entry, name=name, raw=taken, field=field))
    if place != len(raw):
        raise BadRequest(
            f"inputs claim {place} of the {len(raw)} bytes behind the JSON: their binary_data_size"
            " must sum to all",
            field="inputs",
        )
    return tuple(tensors)


def _input(entry: dict[str, Any], *, name: str, raw: memoryview | None, field: str) -> InputTensor:
    datatype = entry.get("datatype")
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        offered = ", ".join(DATATYPES)
        raise BadRequest(
            f"{field}.datatype must be one of {offered}, got {shown_field(entry, 'datatype')}",
            field=f"{field}.datatype",
        )
    shape = _shape(entry, field=f"{field}.shape")
    values = entry.get("data")
    field_of_data = f"{field}.data"
    if (raw is None) == (values is None):
        raise BadRequest(
            f"{field} must have either data, or the parameter binary_data_size and its bytes behind"
            " the JSON",
            field=field_of_data,
        )
    if raw is not None:
        data = array_from_bytes(raw, datatype, math.prod(shape), field=field_of_data)
    else:
        data = array_from_values(
            _flat(values, shape, field=field_of_data), datatype, field=field_of_data
        )
    return InputTensor(
        name=name, datatype=datatype, shape=shape, data=data.reshape(shape), field=field
    )


def _shape(entry: dict[str, Any], *, field: str) -> tuple[int, ...]:
    shape = entry.get("shape")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS:
        raise BadRequest(
            f"{field} must be a list of at most {_MOST_DIMENSIONS} integers, got"
            f" {shown_field(entry, 'shape')}",
            field=field,
        )
    for index, size in enumerate(shape):
        if type(size) is not int or not 1 <= size <= _LONGEST_DIMENSION:
            raise BadRequest(
                f"{field}.{index} must be an integer from 1 to {_LONGEST_DIMENSION}, got"
                f" {shown_flat(size)}",
                field=f"{field}.{index}",
            )
    return tuple(shape)


def _flat(values: object, shape: tuple[int, ...], *, field: str) -> list[Any]:
    """The elements of `data`, row-major: given flat, or nested just as the shape says."""
    if not isinstance(values, list):
        raise BadRequest(f"{field} must be a list, got {shown_flat(values)}", field=field)
    count = math.prod(shape)
    if len(shape) < 2 or not (values and isinstance(values[0], list)):
        if len(values) != count:
            raise BadRequest(
                f"{field} must hold the {count} elements of shape {list(shape)}, got {len(values)}",
                field=field,
            )
        return values
    level: list[Any] = [values]
    for depth, size in enumerate(shape):
        if any(not isinstance(part, list) or len(part) != size for part in level):
            raise BadRequest(
                f"{field} must be flat, or nested as its shape {list(shape)} says: at depth {depth}"
                f" not every list has {size} elements",
                field=field,
            )
        level = list(chain.from_iterable(level))
    return level


def _outputs(
    found: dict[str, Any], *, binary_output: bool, max_top_k: int
) -> tuple[AskedOutput, ...]:
    asked: list[AskedOutput] = []
    names: set[str] = set()
    for index, entry in enumerate(listed(found, "outputs")):
        field = f"outputs.{index}"
        name = name_of(entry, names, field=field)
        require_known(entry, _OUTPUT_FIELDS, field=field)
        within = f"{field}.parameters"
        parameters = parameters_of(entry, field=within)
        binary = flag(parameters, "binary_data", default=binary_output, field=within)
        classes = integer(parameters, "classification", lowest=1, highest=max_top_k, field=within)
        asked.append(AskedOutput(name=name, binary=binary, classes=classes, field=field))
    return tuple(asked)
