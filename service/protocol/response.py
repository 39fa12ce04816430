"""An inference response: named tensors as JSON, or as JSON with raw tensors behind it, and the
classification extension, which writes the best classes of each row as text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evalmode.service.errors import BadRequest
from evalmode.service.protocol.binary import bytes_of
from evalmode.service.protocol.datatypes import Array, datatype_of, values_of
from evalmode.service.strict_json import shown


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputTensor:
    """One output and how it is written; the elements of `data` are `str` or `bytes` where they are
    BYTES.
    """

    name: str
    data: Array
    binary: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """A body; `json_length` is the header that says where its raw tensors begin, None where it is
    JSON alone.
    """

    body: bytes
    json_length: int | None


def encode_response(
    outputs: Sequence[OutputTensor],
    *,
    model_name: str,
    model_version: str,
    digest: str,
    request_id: str | None = None,
) -> Encoded:
    """The response with these outputs in their order; `digest` names every byte of the model that
    answered.

    Raises BadRequest, naming the output, where JSON was asked for and cannot write it.
    """
    response: dict[str, Any] = {"model_name": model_name, "model_version": model_version}
    if request_id is not None:
        response["id"] = request_id
    response["parameters"] = {"digest": digest}
    raw: list[bytes] = []
    response["outputs"] = [_described(output, raw) for output in outputs]
    body = json.dumps(response, allow_nan=False, separators=(",", ":")).encode()
    if not any(output.binary for output in outputs):
        return Encoded(body=body, json_length=None)
    return Encoded(body=b"".join((body, *raw)), json_length=len(body))


def _described(output: OutputTensor, raw: list[bytes]) -> dict[str, Any]:
    """The output as it stands in the JSON; its bytes, where it is binary, are added to `raw`."""
    description: dict[str, Any] = {
        "name": output.name,
        "datatype": datatype_of(output.data),
        "shape": list(output.data.shape),
    }
    if not output.binary:
        return description | {"data": values_of(output.data, field=f"output {output.name}")}
    raw.append(bytes_of(output.data))
    return description | {"parameters": {"binary_data_size": len(raw[-1])}}


def classify(scores: Array, count: int, *, labels: Sequence[str] | None, name: str) -> Array:
    """The `count` best classes (all, if there are fewer) of `scores` (N,) or (N, C), best first:
    BYTES (N, count).

    A class is written `value:index:label`, or `value:index` where no label is known. Of equal
    values the lower index comes first, and NaN comes last. Raises BadRequest for an output that has
    no classes.
    """
    if scores.dtype.kind not in "fiu" or scores.ndim not in (1, 2):
        raise BadRequest(
            f"output {shown(name)} has no classes: classification takes numbers of shape [N] or"
            " [N, C]",
            field="outputs",
        )
    if scores.ndim == 1 or (labels is not None and len(labels) != scores.shape[1]):
        labels = None
    classes = []
    for row in scores.reshape(len(scores), -1).tolist():
        ranked = sorted(enumerate(row), key=lambda pair: (math.isnan(pair[1]), -pair[1]))
        classes.append(
            [
                f"{value!r}:{index}" if labels is None else f"{value!r}:{index}:{labels[index]}"
                for index, value in ranked[:count]
            ]
        )
    return np.array(classes, dtype=object)
