"""An inference response: named tensors as JSON, or as JSON followed by raw bytes of tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evalmode.service.errors import BadRequest
from evalmode.service.protocol.binary import array_to_bytes
from evalmode.service.protocol.datatypes import Array, array_to_values, datatype_of
from evalmode.service.strict_json import shown


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputTensor:
    """One output, which is written as raw bytes if it is `binary`, and else as JSON values.

    The elements of `data` are numbers, bools, or `str` and `bytes` objects for BYTES.
    """

    name: str
    data: Array
    binary: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedResponse:
    """The body of a response. Its first `json_length` bytes are JSON; None means all of it."""

    body: bytes
    json_length: int | None


def encode_response(
    outputs: Sequence[OutputTensor],
    *,
    model_name: str,
    model_version: str,
    digest: str,
    request_id: str | None = None,
) -> EncodedResponse:
    """The response with these outputs in their order.

    `digest` is the digest of the bundle that answered. Raises BadRequest, naming the output, for
    values that JSON cannot write.
    """
    descriptions: list[dict[str, Any]] = []
    raw_parts: list[bytes] = []
    for output in outputs:
        description: dict[str, Any] = {
            "name": output.name,
            "datatype": datatype_of(output.data),
            "shape": list(output.data.shape),
        }
        if output.binary:
            raw = array_to_bytes(output.data)
            raw_parts.append(raw)
            description["parameters"] = {"binary_data_size": len(raw)}
        else:
            description["data"] = array_to_values(output.data, field=f"output {output.name}")
        descriptions.append(description)

    response: dict[str, Any] = {"model_name": model_name, "model_version": model_version}
    if request_id is not None:
        response["id"] = request_id
    response["parameters"] = {"digest": digest}
    response["outputs"] = descriptions

    body = json.dumps(response, allow_nan=False, separators=(",", ":")).encode()
    if not raw_parts:
        return EncodedResponse(body=body, json_length=None)
    return EncodedResponse(body=b"".join([body, *raw_parts]), json_length=len(body))


def classify(scores: Array, count: int, *, labels: Sequence[str] | None, name: str) -> Array:
    """The best classes of each row as text: the protocol's classification extension.

    `scores` has the shape (N,) or (N, C), and the answer (N, min(count, C)): BYTES, best class
    first. A class is `value:index:label`, or `value:index` without labels for the C classes. Of
    equal values the lower index is first, and NaN is last.

    Raises BadRequest for scores of another shape, or that are not numbers; `name` is the output's.

    >>> classify(np.array([[0.25, 0.75]]), 1, labels=["nl", "hu"], name="scores")
    array([['0.75:1:hu']], dtype=object)
    """
    if scores.dtype.kind not in "fiu" or scores.ndim not in (1, 2):
        raise BadRequest(
            f"output {shown(name)} has no classes: classification takes numbers of shape [N] or"
            " [N, C]",
            field="outputs",
        )
    if scores.ndim == 1 or (labels is not None and len(labels) != scores.shape[1]):
        labels = None

    def rank(indexed_value: tuple[int, float]) -> tuple[bool, float]:
        _, value = indexed_value
        return math.isnan(value), -value

    rows: list[list[str]] = []
    for values in scores.reshape(len(scores), -1).tolist():
        classes: list[str] = []
        # `sorted` is stable: of equal values the lower index stays first.
        for index, value in sorted(enumerate(values), key=rank)[:count]:
            text = f"{value!r}:{index}"
            classes.append(text if labels is None else f"{text}:{labels[index]}")
        rows.append(classes)
    return np.array(rows, dtype=object)
