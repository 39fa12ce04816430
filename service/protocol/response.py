"""An inference response: named tensors as JSON, or as JSON with raw tensors behind it. Knows no
model and no status.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evalmode.service.protocol.binary import bytes_of
from evalmode.service.protocol.datatypes import Array, datatype_of, values_of


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
    found: dict[str, Any] = {"model_name": model_name, "model_version": model_version}
    if request_id is not None:
        found["id"] = request_id
    found["parameters"] = {"digest": digest}
    raw: list[bytes] = []
    found["outputs"] = [_described(output, raw) for output in outputs]
    body = json.dumps(found, allow_nan=False, separators=(",", ":")).encode()
    if not any(output.binary for output in outputs):
        return Encoded(body=body, json_length=None)
    return Encoded(body=b"".join((body, *raw)), json_length=len(body))


def _described(output: OutputTensor, raw: list[bytes]) -> dict[str, Any]:
    """The output as it stands in the JSON; its bytes, where it is binary, are added to `raw`."""
    found: dict[str, Any] = {
        "name": output.name,
        "datatype": datatype_of(output.data),
        "shape": list(output.data.shape),
    }
    if not output.binary:
        return found | {"data": values_of(output.data, field=f"output {output.name}")}
    raw.append(bytes_of(output.data))
    return found | {"parameters": {"binary_data_size": len(raw[-1])}}
