"""An inference request: from the bytes of a body to named tensors.

A body has one of three forms, which the header `Inference-Header-Content-Length` tells apart:

- without the header: JSON;
- with the length of the JSON: JSON, followed by the raw bytes of tensors;
- with 0: the raw bytes of the only input of a model.

Whether a model has inputs of these names and shapes is decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

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
    TensorEntry,
    describe_field,
    flag,
    integer,
    parameters_of,
    parse_object,
    require_no_misspelt,
    tensor_entries,
)
from evalmode.service.strict_json import shown_flat, whole_number

JSON_LENGTH_HEADER = "inference-header-content-length"

_REQUEST_FIELDS = ("id", "parameters", "inputs", "outputs")
_INPUT_FIELDS = ("name", "shape", "datatype", "parameters", "data")
_OUTPUT_FIELDS = ("name", "parameters")

# NumPy 1 has no array of more dimensions; NumPy 2 would allow 64.
_MAX_DIMENSIONS = 32
_MAX_DIMENSION = 2**31 - 1

# The protocol's timeout is a signed 64-bit integer, in microseconds.
_MAX_TIMEOUT_US = 2**63 - 1


class InputTensor(NamedTuple):
    """One input tensor of a request.

    Attributes:
        name: the name in the request.
        datatype: one of the protocol's names.
        shape: the shape of `data`.
        data: the elements; those of BYTES are `str` objects from JSON, or `bytes` objects.
        path: the path of the tensor in the body, for error messages.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Array
    path: str


class RequestedOutput(NamedTuple):
    """One output that a request names.

    Attributes:
        name: the name in the request.
        binary: whether it is written as raw bytes after the JSON.
        class_count: how many of its best classes replace its values; None for the values.
        path: the path of the output in the body, for error messages.
    """

    name: str
    binary: bool
    class_count: int | None
    path: str


class InferRequest(NamedTuple):
    """A request for an inference.

    Attributes:
        inputs: at least one.
        id: returned with the response; None if the request has none.
        outputs: in the order of the response; empty for all outputs of the model.
        binary_output: whether outputs without a `binary_data` parameter are written as raw bytes.
        truncate: whether a text that is too long is cut; otherwise it is refused.
        timeout_s: the time for the answer; None for the server's limit.
    """

    inputs: tuple[InputTensor, ...]
    id: str | None = None
    outputs: tuple[RequestedOutput, ...] = ()
    binary_output: bool = False
    truncate: bool = True
    timeout_s: float | None = None


def parse_infer_request(
    body: bytes,
    *,
    json_length: str | None = None,
    max_top_k: int,
    only_input: TensorSpec | None = None,
) -> InferRequest:
    """The request in `body`.

    `json_length` is the value of the header, None without it. `only_input` is the tensor that a raw
    body fills, None for a model of several inputs.

    Raises BadRequest, naming the field and its value. Each size that the request claims is compared
    with the bytes that arrived before memory is allocated.
    """
    if json_length is None:
        json_bytes = len(body)
    else:
        length = whole_number(json_length)
        if length is None or length > len(body):
            raise BadRequest(
                f"header {JSON_LENGTH_HEADER} must be the length of the JSON in the body of"
                f" {len(body)} bytes, got {shown_flat(json_length)}",
                field=JSON_LENGTH_HEADER,
            )
        json_bytes = length
        if json_bytes == 0:
            return _raw_request(memoryview(body), only_input)

    fields = parse_object(body if json_bytes == len(body) else body[:json_bytes])
    require_no_misspelt(fields, _REQUEST_FIELDS)
    request_id = fields.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise BadRequest(f"id must be a string, got {shown_flat(request_id)}", field="id")
    parameters = parameters_of(fields)
    timeout_us = integer(
        parameters, "timeout", lowest=0, highest=_MAX_TIMEOUT_US, path="parameters"
    )
    binary_output = flag(parameters, "binary_data_output", default=False, path="parameters")
    return InferRequest(
        id=request_id,
        inputs=_parse_inputs(fields, memoryview(body)[json_bytes:]),
        outputs=_parse_outputs(fields, binary_output=binary_output, max_top_k=max_top_k),
        binary_output=binary_output,
        truncate=flag(parameters, "truncate", default=True, path="parameters"),
        # Triton's clients write 0 for no timeout.
        timeout_s=timeout_us / 1_000_000 if timeout_us else None,
    )


def _raw_request(raw: memoryview, spec: TensorSpec | None) -> InferRequest:
    """The whole body as the only input of a model; its size decides the dimension that varies."""
    if spec is None:
        raise BadRequest(
            f"a raw body ({JSON_LENGTH_HEADER}: 0) needs a model of one input, and this one has"
            " several: send JSON",
            field=JSON_LENGTH_HEADER,
        )
    path = f"inputs.{spec.name}"

    shape = list(spec.shape)
    if spec.datatype == BYTES:
        # The body is one element, without its length in front.
        shape = [1] * len(shape)
        data: Array = np.array([raw.tobytes()], dtype=object)
    else:
        # Of several dimensions that vary the first one counts rows: the body is one row.
        if shape.count(-1) > 1 and shape[0] == -1:
            shape[0] = 1
        if shape.count(-1) > 1:
            raise BadRequest(
                f"{path} has more than one dimension that varies, which a raw body cannot decide:"
                " send JSON",
                field=path,
            )
        if -1 in shape:
            fixed = [size for size in shape if size != -1]
            step_bytes = math.prod(fixed) * DTYPES[spec.datatype].itemsize
            # At least 1, also of a body that is too short: its size is then refused below.
            shape[shape.index(-1)] = max(1, len(raw) // max(1, step_bytes))
        data = array_from_bytes(raw, spec.datatype, math.prod(shape), field=path)

    tensor = InputTensor(
        name=spec.name,
        datatype=spec.datatype,
        shape=tuple(shape),
        data=data.reshape(shape),
        path=path,
    )
    return InferRequest(inputs=(tensor,), binary_output=True)


def _parse_inputs(fields: dict[str, Any], raw: memoryview) -> tuple[InputTensor, ...]:
    """The inputs of the request; `raw` holds the bytes behind its JSON, in the order of inputs."""
    tensors: list[InputTensor] = []
    position = 0
    for entry in tensor_entries(fields, "inputs", allowed=_INPUT_FIELDS):
        size = None
        if "parameters" in entry.fields:
            size = integer(
                parameters_of(entry.fields, path=entry.path),
                "binary_data_size",
                lowest=0,
                highest=len(raw) - position,
                path=f"{entry.path}.parameters",
            )
        if size is None:
            tensors.append(_parse_input(entry, None))
        else:
            tensors.append(_parse_input(entry, raw[position : position + size]))
            position += size
    if not tensors:
        raise BadRequest("inputs must hold at least 1 tensor", field="inputs")
    if position != len(raw):
        raise BadRequest(
            f"inputs claim {position} of the {len(raw)} bytes behind the JSON: their"
            " binary_data_size must sum to all",
            field="inputs",
        )
    return tuple(tensors)


def _parse_input(entry: TensorEntry, raw: memoryview | None) -> InputTensor:
    """One input, whose elements are the values of `data` or, unless it is None, those in `raw`."""
    datatype = entry.fields.get("datatype")
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise BadRequest(
            f"{entry.path}.datatype must be one of {', '.join(DATATYPES)}, got"
            f" {describe_field(entry.fields, 'datatype')}",
            field=f"{entry.path}.datatype",
        )

    sizes = entry.fields.get("shape")
    if not isinstance(sizes, list) or len(sizes) > _MAX_DIMENSIONS:
        raise BadRequest(
            f"{entry.path}.shape must be a list of at most {_MAX_DIMENSIONS} integers, got"
            f" {describe_field(entry.fields, 'shape')}",
            field=f"{entry.path}.shape",
        )
    for index, size in enumerate(sizes):
        # `type`, because Python counts a bool as an integer.
        if type(size) is not int or not 1 <= size <= _MAX_DIMENSION:
            raise BadRequest(
                f"{entry.path}.shape.{index} must be an integer from 1 to {_MAX_DIMENSION}, got"
                f" {shown_flat(size)}",
                field=f"{entry.path}.shape.{index}",
            )
    shape = tuple(sizes)

    field = f"{entry.path}.data"
    values = entry.fields.get("data")
    if (raw is None) == (values is None):
        raise BadRequest(
            f"{entry.path} must have either data, or the parameter binary_data_size and its bytes"
            " behind the JSON",
            field=field,
        )
    if raw is None:
        data = array_from_values(_flatten(values, shape, field=field), datatype, field=field)
    else:
        data = array_from_bytes(raw, datatype, math.prod(shape), field=field)
    return InputTensor(
        name=entry.name, datatype=datatype, shape=shape, data=data.reshape(shape), path=entry.path
    )


def _flatten(values: object, shape: Sequence[int], *, field: str) -> list[Any]:
    """The elements of `data` in row-major order; it is flat, or nested exactly as `shape`."""
    if not isinstance(values, list):
        raise BadRequest(f"{field} must be a list, got {shown_flat(values)}", field=field)

    is_nested = len(shape) > 1 and len(values) > 0 and isinstance(values[0], list)
    if not is_nested:
        count = math.prod(shape)
        if len(values) != count:
            raise BadRequest(
                f"{field} must hold the {count} elements of shape {list(shape)}, got {len(values)}",
                field=field,
            )
        return values

    # One dimension after the other: all lists of a depth are joined to the elements of the next.
    level: list[Any] = [values]
    for depth, size in enumerate(shape):
        for nested in level:
            if not isinstance(nested, list) or len(nested) != size:
                raise BadRequest(
                    f"{field} must be flat, or nested as its shape {list(shape)} says: at depth"
                    f" {depth} not every list has {size} elements",
                    field=field,
                )
        level = list(chain.from_iterable(level))
    return level


def _parse_outputs(
    fields: dict[str, Any], *, binary_output: bool, max_top_k: int
) -> tuple[RequestedOutput, ...]:
    outputs: list[RequestedOutput] = []
    for entry in tensor_entries(fields, "outputs", allowed=_OUTPUT_FIELDS):
        parameters = parameters_of(entry.fields, path=entry.path)
        path = f"{entry.path}.parameters"
        binary = flag(parameters, "binary_data", default=binary_output, path=path)
        class_count = integer(parameters, "classification", lowest=1, highest=max_top_k, path=path)
        outputs.append(
            RequestedOutput(
                name=entry.name, binary=binary, class_count=class_count, path=entry.path
            )
        )
    return tuple(outputs)
