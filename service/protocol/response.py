"""An inference response: named tensors as JSON, or as JSON followed by raw bytes of tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from evalmode.service.errors import BadRequest
from evalmode.service.protocol.binary import array_to_bytes
from evalmode.service.protocol.datatypes import Array, array_to_json, datatype_of
from evalmode.service.strict_json import shown


class OutputTensor(NamedTuple):
    """One output, which is written as raw bytes if it is `binary`, and else as JSON values.

    The elements of `data` are numbers, bools, or `str` and `bytes` objects for BYTES.
    """

    name: str
    data: Array
    binary: bool


class EncodedResponse(NamedTuple):
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
    # Written as bytes, because a dictionary of all this takes twice as long.
    raw_parts: list[bytes] = []
    written: list[bytes] = []
    for output in outputs:
        shape = ",".join(map(str, output.data.shape))
        if output.binary:
            raw = array_to_bytes(output.data)
            raw_parts.append(raw)
            content = b'"parameters":{"binary_data_size":%d}' % len(raw)
        else:
            content = b'"data":' + array_to_json(output.data, field=f"output {output.name}")
        written.append(
            b'{"name":%b,"datatype":"%b","shape":[%b],%b}'
            % (_quoted(output.name), datatype_of(output.data).encode(), shape.encode(), content)
        )
    body = b'{"model_name":%b,"model_version":%b%b,"parameters":{"digest":"%b"},"outputs":[%b]}' % (
        _quoted(model_name),
        _quoted(model_version),
        b"" if request_id is None else b',"id":' + json.dumps(request_id).encode(),
        digest.encode(),
        b",".join(written),
    )
    if not raw_parts:
        return EncodedResponse(body, None)
    return EncodedResponse(b"".join([body, *raw_parts]), len(body))


@lru_cache(maxsize=1_000)
def _quoted(name: str) -> bytes:
    """A name of a model, a version or an output as JSON. There are few."""
    return json.dumps(name).encode()


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
