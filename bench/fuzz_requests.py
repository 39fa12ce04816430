"""Requests that were good once, and what mistaken and malicious clients make of them: what
`bench/fuzz.py` sends.

Bodies of the Open Inference Protocol, our own JSON and streams of lines, with something wrong in
the tensors, the JSON, the raw bytes, the compression or the HTTP around them. Knows no socket; the
same chance makes the same requests.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BOMB_BYTES = 64 << 20

DTYPES = {
    f"{name}{bits}": f"<{kind}{bits // 8}"
    for name, kind in (("INT", "i"), ("UINT", "u"))
    for bits in (8, 16, 32, 64)
}
DTYPES |= {"BOOL": "?", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
TEXTS = [
    "",
    "Ez egy rövid mondat.",
    "Dit is een zin.",
    "これは文です。",
    "👍" * 9,
    "ﷺ\0\u2028",
    "x" * 5_000,
]

# What is put into the place of something good.
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 0.5, 1e308, 2**31, 2**63, -(2**63) - 1, 10**400, "", "x", "\ud83d",
    "\0", "FP16", [], [[]], [[[]]] * 9, {}, {"a": 1}, [0], [-1], [2**62] * 32, "9" * 999,
    float("nan"), float("-inf"), "../../etc",
]  # fmt: skip
ODD_AT: dict[str, list[Any]] = {
    "shape": [
        [], [0], [-1], [1], [3], [2**31, 2**31], [2**63], [10**9, 10**9, 10**9], [1] * 999, [1.0],
        ["1"], [True], [[1]],
    ],
    "binary_data_size": [0, -1, 1, 3, 4, 2**31, 2**32, 2**63, 2**64 + 8, 1.5, "8", None, True, [8]],
    "datatype": [*DTYPES, "BYTES", "FP8", "bytes", ""],
}  # fmt: skip
LENGTHS = ["0", "-1", "", "x", "1.0", "0x10", "+5", "9" * 30, "٣", " 7 "]
QUERIES = [
    "", "", "&top_k=2", "&top_k=0", "&top_k=x", "&x=1", "&truncate=false", "&version=9",
    "&top_k=1&top_k=1",
]  # fmt: skip
SPLICES = [
    b"\xff" * 4, b"\xff\xff\xff\x7f", b"[" * 2_000, b'{"a":' * 2_000, b"\0", b"{}", b",", b'"',
    b"\n", b"NaN", b"1" * 5_000,
]  # fmt: skip
CHUNKS = [b"-1\r\n", b"x\r\n", b"f" * 17 + b"\r\n", b"5;a=b\r\nabc", b"\r\n", b"3\r\nabcdef\r\n"]
FRAMINGS = ["chunked"] * 20 + [
    "shorter", "longer", "unended", "none", "no length", "both", "chunks spoilt", "hang up",
]  # fmt: skip
HEADERS = {
    "accept-encoding": ["gzip", "deflate", "gzip;q=0, deflate;q=x", "*", ","],
    "x-request-timeout-ms": ["1", "0", "-1", "x", "9" * 40, "1e3"],
    "x-request-id": ["a", "\u00e9", "x" * 300, "{}"],
    "expect": ["100-continue", "200-ok"],
    "upgrade": ["h2c"],
    "x-long": ["x" * 20_000],
    "host": [""],
    "accept": ["text/html", "application/octet-stream"],
}
ENCODINGS = ["br", "gzip, gzip", "identity", "gzip", "deflate", "zstd", ""]
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "x-gzip": lambda plain: (
        gzip.compress(plain[: len(plain) // 2]) + gzip.compress(plain[len(plain) // 2 :])
    ),
    "Deflate": lambda plain: zlib.compress(plain, wbits=-15),
}


def bombs() -> list[tuple[str, bytes]]:
    """Bodies of some 64 KB that unfold to 64 MB, and one that unfolds to another."""
    zeros, spaces, nested = bytes(BOMB_BYTES), b" " * BOMB_BYTES, b"[" * BOMB_BYTES
    packed = [
        ("gzip", gzip.compress(zeros)),
        ("deflate", zlib.compress(spaces)),
        ("gzip", gzip.compress(nested)),
    ]
    return [
        *packed,
        ("deflate", zlib.compress(zeros, wbits=-15)),
        ("gzip", gzip.compress(packed[0][1])),
    ]


@dataclass(kw_only=True)
class Request:
    """What is sent; `framing` is how its end is told, and `known` whose answer must be the one from
    before.
    """

    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "POST"
    framing: str = "length"
    known: str | None = None

    @property
    def late(self) -> bool:
        """Whether the server has to wait for more."""
        return self.framing in ("longer", "unended")

    def sent(self, chance: random.Random) -> bytes:
        """The bytes on the wire."""
        length, body, headers = len(self.body), self.body, {"host": "x", **self.headers}
        if self.framing in ("chunked", "unended", "both", "chunks spoilt"):
            cuts = sorted(chance.randrange(length + 1) for _ in range(chance.randint(0, 5)))
            parts = [
                body[start:end] for start, end in zip([0, *cuts], [*cuts, length], strict=True)
            ]
            body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts if part)
            body += b"" if self.framing == "unended" else b"0\r\n\r\n"
            headers["transfer-encoding"] = "chunked"
        if self.framing == "chunks spoilt":
            body = chance.choice(CHUNKS) + body
        if self.framing not in ("chunked", "unended", "chunks spoilt", "none"):
            wrong = {
                "longer": length + chance.randint(1, 99),
                "shorter": chance.randrange(length + 1),
            }
            headers["content-length"] = str(wrong.get(self.framing, length))
        if self.framing == "no length":
            headers["content-length"] = chance.choice(LENGTHS[1:])
        head = [
            f"{self.method} {self.path} HTTP/1.1",
            *(f"{name}: {value}" for name, value in headers.items()),
            "",
            "",
        ]
        return "\r\n".join(head).encode() + body


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that is served, and what goes into it."""

    name: str
    inputs: list[dict[str, Any]]

    @property
    def reads_texts(self) -> bool:
        return any(tensor["name"] == "text" for tensor in self.inputs)

    def good(self, chance: random.Random) -> tuple[dict[str, Any], bytes]:
        """A good request of the protocol, and the raw tensors behind it."""
        texts = self.reads_texts and chance.random() < 0.5
        rows, free = chance.choice((1, 1, 2, 3, 8, 300)), chance.randint(1, 8)
        tensors, raw = [], b""
        for spec in self.inputs:
            if self.reads_texts and (spec["name"] == "text") != texts:
                continue
            sizes = [rows if place == 0 else free for place in range(len(spec["shape"]))]
            shape = [
                size if given == -1 else given
                for given, size in zip(spec["shape"], sizes, strict=True)
            ]
            tensor, packed = tensor_of(spec, shape, chance)
            tensors.append(tensor)
            raw += packed
        found = {
            "id": "7",
            "inputs": tensors,
            "parameters": {"binary_data_output": chance.random() < 0.3},
        }
        return found, raw


def tensor_of(
    spec: dict[str, Any], shape: list[int], chance: random.Random
) -> tuple[dict[str, Any], bytes]:
    """A tensor with its elements in JSON, or raw behind it."""
    count, datatype = math.prod(shape), spec["datatype"]
    tensor: dict[str, Any] = {"name": spec["name"], "datatype": datatype, "shape": shape}
    if datatype == "BYTES":
        values: list[Any] = [chance.choice(TEXTS) for _ in range(count)]
        raw = b"".join(len(text.encode()).to_bytes(4, "little") + text.encode() for text in values)
    else:
        array = np.array([chance.randint(0, 1) for _ in range(count)]).astype(DTYPES[datatype])
        values, raw = array.tolist(), array.tobytes()
    if chance.random() < 0.5:
        tensor["parameters"] = {"binary_data_size": len(raw)}
        return tensor, raw
    tensor["data"] = values
    return tensor, b""


def mutated(found: Any, chance: random.Random) -> Any:
    """The JSON value with something in it replaced, removed, doubled or added."""
    if chance.random() < 0.2 or not isinstance(found, dict | list) or not found:
        return chance.choice(ODD)
    found = dict(found) if isinstance(found, dict) else list(found)
    key = chance.choice(list(found) if isinstance(found, dict) else range(len(found)))
    how = chance.random()
    if how < 0.15:
        del found[key]
    elif how < 0.25:
        if isinstance(found, list):
            found.append(found[key])
        else:
            found[
                chance.choice(
                    ["data", "shape", "parameters", "outputs", "shared_memory_region", "id"]
                )
            ] = found[key]
    else:
        apt = ODD_AT.get(key, []) if isinstance(key, str) and how < 0.8 else []
        found[key] = chance.choice(apt) if apt else mutated(found[key], chance)
    return found


def scrambled(raw: bytes, chance: random.Random) -> bytes:
    """The bytes with some of them changed, cut off or added."""
    spoilt = bytearray(raw)
    for _ in range(chance.randint(1, 4)):
        place, how = chance.randrange(len(spoilt) + 1), chance.random()
        if how < 0.4 and place < len(spoilt):
            spoilt[place] = chance.randrange(256)
        elif how < 0.6:
            del spoilt[place:]
        else:
            spoilt[place:place] = chance.choice([*SPLICES, chance.randbytes(8)])
    return bytes(spoilt)


def packed(request: Request, chance: random.Random, explosive: list[tuple[str, bytes]]) -> None:
    """Compress the body: soundly, brokenly, under another name, or as a bomb."""
    how, encoding = chance.random(), chance.choice(list(PACKERS))
    request.headers["content-encoding"] = encoding
    if how < 0.05:
        request.headers["content-encoding"], request.body = chance.choice(explosive)
        return
    if how < 0.9:
        request.body = PACKERS[encoding](request.body)
    if how > 0.5:
        request.body = scrambled(request.body, chance)
    if 0.45 < how < 0.55:
        request.headers["content-encoding"] = chance.choice(ENCODINGS)


def v2_request(model: Model, chance: random.Random, explosive: list[tuple[str, bytes]]) -> Request:
    """A request of the Open Inference Protocol, usually a bad one."""
    found: Any
    found, raw = model.good(chance)
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        found = mutated(found, chance)
    head = json.dumps(found).encode()
    length = str(len(head)) if raw or chance.random() < 0.5 else None
    if chance.random() < 0.15:
        head = scrambled(head, chance)
    if chance.random() < 0.25:
        raw = scrambled(raw, chance)
    if chance.random() < 0.1:
        length = chance.choice([*LENGTHS, str(len(head) + len(raw) + 1), str(len(head) // 2), None])
    request = Request(path=f"/v2/models/{model.name}/infer", body=head + raw)
    if length is not None:
        request.headers["inference-header-content-length"] = length
    if chance.random() < 0.03:
        own = [
            f"/v2/models/{model.name}/versions/9/infer",
            f"/v2/models/{model.name}/infer/",
            "/v2/repository/index",
        ]
        request.path = chance.choice(
            [*own, "/v2/models//infer", "/v2/models/\u200b/infer", "/v2/models/%2e%2e%2fx/infer"]
        )
    if chance.random() < 0.25:
        packed(request, chance, explosive)
    return request


def v1_request(model: Model, chance: random.Random) -> Request:
    """A request for predictions, or a stream of lines."""
    texts = [chance.choice(TEXTS) for _ in range(chance.choice((0, 1, 2, 9, 300)))]
    if chance.random() < 0.4:
        lines = [
            chance.choice(
                [text, {"text": text, "id": 1}, mutated({"text": text, "id": {}}, chance)]
            )
            for text in texts
        ]
        body = b"\n".join(json.dumps(line).encode() for line in lines)
        request = Request(path=f"/v1/predict?model={model.name}{chance.choice(QUERIES)}", body=body)
        request.headers["content-type"] = "application/x-ndjson"
    else:
        found: Any = {"inputs": texts, "model": model.name, "top_k": 2, "truncate": True}
        for _ in range(chance.choice((0, 1, 1, 2))):
            found = mutated(found, chance)
        request = Request(path="/v1/predict", body=json.dumps(found).encode())
        request.headers["content-type"] = chance.choice(
            ["application/json"] * 8 + ["text/plain", "", "a/b;", "\u00e9"]
        )
    if chance.random() < 0.2:
        request.body = scrambled(request.body, chance)
    return request


def surrounded(request: Request, chance: random.Random) -> None:
    """Something about the HTTP around the body is unusual, or wrong."""
    if chance.random() < 0.3:
        request.framing = chance.choice(FRAMINGS)
    for name, values in HEADERS.items():
        if chance.random() < 0.03:
            request.headers[name] = chance.choice(values)
    if chance.random() < 0.01:
        request.method = chance.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW", "post"])
    if chance.random() < 0.003:
        request.body = request.body.ljust(3 << 20)


def known_good(model: Model) -> list[Request]:
    """Requests that always have the same answer, bit for bit."""
    chance = random.Random(7)
    found = []
    for number in range(4):
        body, raw = model.good(chance)
        head = json.dumps(body).encode()
        headers = {"inference-header-content-length": str(len(head))}
        path = f"/v2/models/{model.name}/infer"
        found.append(
            Request(path=path, body=head + raw, headers=headers, known=f"{model.name}, {number}")
        )
    if model.reads_texts:
        body = {"inputs": TEXTS, "model": model.name}
        found.append(
            Request(
                path="/v1/predict", body=json.dumps(body).encode(), known=f"{model.name}, texts"
            )
        )
    return found


def request_of(
    models: list[Model], chance: random.Random, explosive: list[tuple[str, bytes]]
) -> Request:
    """A request, usually a bad one."""
    model = chance.choice(models)
    request = (
        v1_request(model, chance) if chance.random() < 0.2 else v2_request(model, chance, explosive)
    )
    surrounded(request, chance)
    return request
