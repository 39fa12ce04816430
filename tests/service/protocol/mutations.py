"""Bodies of the Open Inference Protocol that were good once, and what mistaken clients make of
them.
"""

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

from evalmode.service.protocol.binary import bytes_of
from evalmode.service.protocol.datatypes import DATATYPES, DTYPES

# EVALMODE_FUZZ=50000 is the long run.
CASES = int(os.environ.get("EVALMODE_FUZZ", "5000"))

_ODD = [
    None, True, False, 0, -1, 1, 1.0, 1e400, 2**31, 2**63, -(2**63) - 1, 10**400, "", "x", "\ud83d",
    "INT64", "BYTES", [], [[]], [[[]]] * 9, {}, {"a": 1}, [1, 2], [0], [-1], [2**62] * 32,
    "9" * 999,
]  # fmt: skip


@dataclass(kw_only=True)
class Body:
    head: bytes
    raw: bytes
    json_length: str | None
    encoding: str | None
    compress: Callable[[bytes], bytes] | None

    @property
    def sent(self) -> bytes:
        plain = self.head + self.raw
        return plain if self.compress is None else self.compress(plain)


def good(chance: random.Random) -> tuple[dict[str, Any], bytes]:
    """A good request, with raw tensors behind it or none; many of them are good for the models of
    the tests too.
    """
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
            packed = bytes_of(array)
            tensor["parameters"] = {"binary_data_size": len(packed)}
            raw += packed
        else:
            tensor["data"] = ["ab"] * count if datatype == "BYTES" else array.tolist()
        inputs.append(tensor)
    found = {"id": "1", "parameters": {"truncate": True}, "inputs": inputs}
    if chance.random() < 0.3:
        output = chance.choice(["logits", "probabilities", "label", "truncated", "y"])
        found["outputs"] = [
            {"name": output, "parameters": {"classification": 2, "binary_data": True}}
        ]
    return found, raw


def _tensors(chance: random.Random) -> list[tuple[str, str, list[int]]]:
    """Names, datatypes and shapes."""
    rows, how = chance.randint(1, 3), chance.random()
    if how < 0.3:
        return [("text", "BYTES", chance.choice([[rows], [rows, 1]]))]
    if how < 0.6:
        return [chance.choice([("input_ids", "INT64", [rows, 2, 6]), ("x", "FP32", [rows, 4])])]
    return [
        (
            f"x{index}",
            chance.choice(DATATYPES),
            [chance.randint(1, 3) for _ in range(chance.randint(0, 3))],
        )
        for index in range(rows)
    ]


def mutate(found: Any, chance: random.Random) -> Any:
    """The value with something in it replaced, removed, doubled or added."""
    if chance.random() < 0.25 or not isinstance(found, dict | list) or not found:
        return chance.choice(_ODD)
    found = dict(found) if isinstance(found, dict) else list(found)
    key = chance.choice(list(found) if isinstance(found, dict) else range(len(found)))
    how = chance.random()
    if how < 0.15:
        del found[key]
    elif how < 0.25 and isinstance(found, list):
        found.append(found[key])
    elif how < 0.35 and isinstance(found, dict):
        found[
            chance.choice(
                ["data", "shape", "parameters", "binary_data_size", "shared_memory_region"]
            )
        ] = found[key]
    else:
        found[key] = mutate(found[key], chance)
    return found


def scramble(raw: bytes, chance: random.Random) -> bytes:
    """The bytes with some of them changed, cut off or added."""
    spoilt = bytearray(raw)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(spoilt) + 1)
        how = chance.random()
        if how < 0.4 and place < len(spoilt):
            spoilt[place] = chance.randrange(256)
        elif how < 0.7:
            del spoilt[place:]
        else:
            spoilt[place:place] = chance.choice(
                [b"\xff" * 4, b"[" * 2000, b"\0", b"{}", chance.randbytes(8)]
            )
    return bytes(spoilt)


def case(chance: random.Random) -> Body:
    found, raw = good(chance)
    for _ in range(chance.randint(0, 3)):
        found = mutate(found, chance)
    head = json.dumps(found).encode()
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
        packer = gzip.compress if chance.random() < 0.5 else zlib.compress
        body.compress = lambda plain: packer(plain)
        if chance.random() < 0.1:
            body.raw += bytes(10**6)
        if chance.random() < 0.3:
            seed = chance.random()
            body.compress = lambda plain: scramble(packer(plain), random.Random(seed))
    return body
