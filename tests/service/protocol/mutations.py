"""Bodies of the Open Inference Protocol with random mistakes, as wrong clients may send them."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from evalmode.service.protocol.binary import array_to_bytes
from evalmode.service.protocol.datatypes import DATATYPES, DTYPES

# EVALMODE_FUZZ=50000 is the long run.
CASES = int(os.environ.get("EVALMODE_FUZZ", "5000"))

_ODD_VALUES = [
    None, True, False, 0, -1, 1, 1.0, 1e400, 2**31, 2**63, -(2**63) - 1, 10**400, "", "x", "\ud83d",
    "INT64", "BYTES", [], [[]], [[[]]] * 9, {}, {"a": 1}, [1, 2], [0], [-1], [2**62] * 32,
    "9" * 999,
]  # fmt: skip


@dataclass(kw_only=True)
class Body:
    """A body and its headers; `compress` is applied to its JSON and its raw tensors together."""

    head: bytes
    raw: bytes
    json_length: str | None
    encoding: str | None
    compress: Callable[[bytes], bytes] | None

    @property
    def content(self) -> bytes:
        """The bytes that the client sends."""
        plain = self.head + self.raw
        return plain if self.compress is None else self.compress(plain)


def valid_request(chance: random.Random) -> tuple[dict[str, Any], bytes]:
    """A valid request, and the raw tensors behind it; many are valid for the tests' models too."""
    inputs, raw = [], b""
    for name, datatype, shape in _tensors(chance):
        count = math.prod(shape)
        array = (
            np.array([b"ab"] * count, dtype=object)
            if datatype == "BYTES"
            else np.ones(count, DTYPES[datatype])
        )
        tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
        if chance.random() < 0.5:
            packed = array_to_bytes(array)
            tensor["parameters"] = {"binary_data_size": len(packed)}
            raw += packed
        else:
            tensor["data"] = ["ab"] * count if datatype == "BYTES" else array.tolist()
        inputs.append(tensor)
    request = {"id": "1", "parameters": {"truncate": True}, "inputs": inputs}
    if chance.random() < 0.3:
        output = chance.choice(["logits", "probabilities", "label", "truncated", "y"])
        request["outputs"] = [
            {"name": output, "parameters": {"classification": 2, "binary_data": True}}
        ]
    return request, raw


def _tensors(chance: random.Random) -> list[tuple[str, str, list[int]]]:
    """Names, datatypes and shapes."""
    rows, dice = chance.randint(1, 3), chance.random()
    if dice < 0.3:
        return [("text", "BYTES", chance.choice([[rows], [rows, 1]]))]
    if dice < 0.6:
        return [chance.choice([("input_ids", "INT64", [rows, 2, 6]), ("x", "FP32", [rows, 4])])]
    return [
        (
            f"x{index}",
            chance.choice(DATATYPES),
            [chance.randint(1, 3) for _ in range(chance.randint(0, 3))],
        )
        for index in range(rows)
    ]


def mutate(value: Any, chance: random.Random) -> Any:
    """The value with a part of it replaced, removed, repeated or added."""
    if chance.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return chance.choice(_ODD_VALUES)
    value = dict(value) if isinstance(value, dict) else list(value)
    key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
    dice = chance.random()
    if dice < 0.15:
        del value[key]
    elif dice < 0.25 and isinstance(value, list):
        value.append(value[key])
    elif dice < 0.35 and isinstance(value, dict):
        value[
            chance.choice(
                ["data", "shape", "parameters", "binary_data_size", "shared_memory_region"]
            )
        ] = value[key]
    else:
        value[key] = mutate(value[key], chance)
    return value


def scramble(raw: bytes, chance: random.Random) -> bytes:
    """The bytes with some of them changed, cut off or added."""
    scrambled = bytearray(raw)
    for _ in range(chance.randint(1, 4)):
        position = chance.randrange(len(scrambled) + 1)
        dice = chance.random()
        if dice < 0.4 and position < len(scrambled):
            scrambled[position] = chance.randrange(256)
        elif dice < 0.7:
            del scrambled[position:]
        else:
            scrambled[position:position] = chance.choice(
                [b"\xff" * 4, b"[" * 2000, b"\0", b"{}", chance.randbytes(8)]
            )
    return bytes(scrambled)


def random_body(chance: random.Random) -> Body:
    """A valid request after at most three mutations, perhaps scrambled and compressed."""
    request, raw = valid_request(chance)
    for _ in range(chance.randint(0, 3)):
        request = mutate(request, chance)
    head = json.dumps(request).encode()
    length = str(len(head)) if raw or chance.random() < 0.5 else None
    if chance.random() < 0.3:
        head = scramble(head, chance)
    if chance.random() < 0.3:
        raw = scramble(raw, chance)
    if chance.random() < 0.1:
        length = chance.choice(
            ["0", "-1", "", "x", "9" * 30, str(len(head) + len(raw) + 1), str(len(head) // 2), None]
        )
    body = Body(head=head, raw=raw, json_length=length, encoding=None, compress=None)
    if chance.random() < 0.3:
        body.encoding = chance.choice(["gzip", "deflate"])
        compress = gzip.compress if chance.random() < 0.5 else zlib.compress
        body.compress = lambda plain: compress(plain)
        if chance.random() < 0.1:
            body.raw += bytes(10**6)
        if chance.random() < 0.3:
            seed = chance.random()
            body.compress = lambda plain: scramble(compress(plain), random.Random(seed))
    return body
