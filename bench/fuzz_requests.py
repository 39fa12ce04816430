"""The requests that `bench/fuzz.py` sends: good ones, and good ones with mistakes in them.

The bodies are those of the Open Inference Protocol, our own JSON, and streams of lines. A mistake
is in the tensors, the JSON, the raw bytes, the compression or the HTTP around them. The same random
generator makes the same requests.
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

# Values that replace good ones.
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


def make_bombs() -> list[tuple[str, bytes]]:
    """Encodings and bodies of about 64 KB that decompress to 64 MB; the last one twice."""
    zeros, spaces, nested = bytes(BOMB_BYTES), b" " * BOMB_BYTES, b"[" * BOMB_BYTES
    packed_zeros = gzip.compress(zeros)
    return [
        ("gzip", packed_zeros),
        ("deflate", zlib.compress(spaces)),
        ("gzip", gzip.compress(nested)),
        ("deflate", zlib.compress(zeros, wbits=-15)),
        ("gzip", gzip.compress(packed_zeros)),
    ]


@dataclass(kw_only=True)
class Request:
    """A request.

    `framing` is how it declares its end, one of FRAMINGS or "length". Requests with the same
    `answer_key` must always get the same answer.
    """

    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "POST"
    framing: str = "length"
    answer_key: str | None = None

    @property
    def is_incomplete(self) -> bool:
        """Whether the server has to wait for more bytes, which never arrive."""
        return self.framing in ("longer", "unended")

    def encode(self, rng: random.Random) -> bytes:
        """The bytes on the wire."""
        length, body, headers = len(self.body), self.body, {"host": "x", **self.headers}
        if self.framing in ("chunked", "unended", "both", "chunks spoilt"):
            cuts = sorted(rng.randrange(length + 1) for _ in range(rng.randint(0, 5)))
            parts = [
                body[start:end] for start, end in zip([0, *cuts], [*cuts, length], strict=True)
            ]
            body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts if part)
            body += b"" if self.framing == "unended" else b"0\r\n\r\n"
            headers["transfer-encoding"] = "chunked"
        if self.framing == "chunks spoilt":
            body = rng.choice(CHUNKS) + body
        if self.framing not in ("chunked", "unended", "chunks spoilt", "none"):
            wrong_lengths = {
                "longer": length + rng.randint(1, 99),
                "shorter": rng.randrange(length + 1),
            }
            headers["content-length"] = str(wrong_lengths.get(self.framing, length))
        if self.framing == "no length":
            headers["content-length"] = rng.choice(LENGTHS[1:])
        head = [
            f"{self.method} {self.path} HTTP/1.1",
            *(f"{name}: {value}" for name, value in headers.items()),
            "",
            "",
        ]
        return "\r\n".join(head).encode() + body


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the server, with the metadata of its inputs."""

    name: str
    inputs: list[dict[str, Any]]

    @property
    def reads_texts(self) -> bool:
        return any(tensor["name"] == "text" for tensor in self.inputs)

    def good(self, rng: random.Random) -> tuple[dict[str, Any], bytes]:
        """A good request of the protocol, and the raw tensors that follow its JSON."""
        texts = self.reads_texts and rng.random() < 0.5
        rows, free = rng.choice((1, 1, 2, 3, 8, 300)), rng.randint(1, 8)
        tensors, raw = [], b""
        for spec in self.inputs:
            if self.reads_texts and (spec["name"] == "text") != texts:
                continue
            # The first axis is the batch; every other free axis has the same size.
            shape = []
            for axis, size in enumerate(spec["shape"]):
                if size != -1:
                    shape.append(size)
                elif axis == 0:
                    shape.append(rows)
                else:
                    shape.append(free)
            tensor, tensor_bytes = tensor_of(spec, shape, rng)
            tensors.append(tensor)
            raw += tensor_bytes
        request = {
            "id": "7",
            "inputs": tensors,
            "parameters": {"binary_data_output": rng.random() < 0.3},
        }
        return request, raw


def tensor_of(
    spec: dict[str, Any], shape: list[int], rng: random.Random
) -> tuple[dict[str, Any], bytes]:
    """A tensor with its elements in the JSON, or as raw bytes after it."""
    count, datatype = math.prod(shape), spec["datatype"]
    tensor: dict[str, Any] = {"name": spec["name"], "datatype": datatype, "shape": shape}
    if datatype == "BYTES":
        values: list[Any] = [rng.choice(TEXTS) for _ in range(count)]
        raw = b"".join(len(text.encode()).to_bytes(4, "little") + text.encode() for text in values)
    else:
        array = np.array([rng.randint(0, 1) for _ in range(count)]).astype(DTYPES[datatype])
        values, raw = array.tolist(), array.tobytes()
    if rng.random() < 0.5:
        tensor["parameters"] = {"binary_data_size": len(raw)}
        return tensor, raw
    tensor["data"] = values
    return tensor, b""


def mutate(value: Any, rng: random.Random) -> Any:
    """The JSON value with one thing in it replaced, removed, doubled or added."""
    if rng.random() < 0.2 or not isinstance(value, dict | list) or not value:
        return rng.choice(ODD)
    value = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    how = rng.random()
    if how < 0.15:
        del value[key]
    elif how < 0.25 and isinstance(value, list):
        value.append(value[key])
    elif how < 0.25:
        names = ["data", "shape", "parameters", "outputs", "shared_memory_region", "id"]
        value[rng.choice(names)] = value[key]
    else:
        odd_values = ODD_AT.get(key, []) if isinstance(key, str) and how < 0.8 else []
        value[key] = rng.choice(odd_values) if odd_values else mutate(value[key], rng)
    return value


def scramble(raw: bytes, rng: random.Random) -> bytes:
    """The bytes with some of them changed, removed or added."""
    spoiled = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        index, how = rng.randrange(len(spoiled) + 1), rng.random()
        if how < 0.4 and index < len(spoiled):
            spoiled[index] = rng.randrange(256)
        elif how < 0.6:
            del spoiled[index:]
        else:
            spoiled[index:index] = rng.choice([*SPLICES, rng.randbytes(8)])
    return bytes(spoiled)


def compress_body(request: Request, rng: random.Random, bombs: list[tuple[str, bytes]]) -> None:
    """Compress the body: correctly, with broken bytes, under another name, or as a bomb."""
    how, encoding = rng.random(), rng.choice(list(PACKERS))
    request.headers["content-encoding"] = encoding
    if how < 0.05:
        request.headers["content-encoding"], request.body = rng.choice(bombs)
        return
    if how < 0.9:
        request.body = PACKERS[encoding](request.body)
    if how > 0.5:
        request.body = scramble(request.body, rng)
    if 0.45 < how < 0.55:
        request.headers["content-encoding"] = rng.choice(ENCODINGS)


def v2_request(model: Model, rng: random.Random, bombs: list[tuple[str, bytes]]) -> Request:
    """A request of the Open Inference Protocol, usually with mistakes."""
    body: Any
    body, raw = model.good(rng)
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        body = mutate(body, rng)
    head = json.dumps(body).encode()
    length = str(len(head)) if raw or rng.random() < 0.5 else None
    if rng.random() < 0.15:
        head = scramble(head, rng)
    if rng.random() < 0.25:
        raw = scramble(raw, rng)
    if rng.random() < 0.1:
        length = rng.choice([*LENGTHS, str(len(head) + len(raw) + 1), str(len(head) // 2), None])
    request = Request(path=f"/v2/models/{model.name}/infer", body=head + raw)
    if length is not None:
        request.headers["inference-header-content-length"] = length
    if rng.random() < 0.03:
        paths = [
            f"/v2/models/{model.name}/versions/9/infer",
            f"/v2/models/{model.name}/infer/",
            "/v2/repository/index",
        ]
        request.path = rng.choice(
            [*paths, "/v2/models//infer", "/v2/models/\u200b/infer", "/v2/models/%2e%2e%2fx/infer"]
        )
    if rng.random() < 0.25:
        compress_body(request, rng, bombs)
    return request


def v1_request(model: Model, rng: random.Random) -> Request:
    """A request for predictions, or a stream of lines."""
    texts = [rng.choice(TEXTS) for _ in range(rng.choice((0, 1, 2, 9, 300)))]
    if rng.random() < 0.4:
        lines = [
            rng.choice([text, {"text": text, "id": 1}, mutate({"text": text, "id": {}}, rng)])
            for text in texts
        ]
        body = b"\n".join(json.dumps(line).encode() for line in lines)
        request = Request(path=f"/v1/predict?model={model.name}{rng.choice(QUERIES)}", body=body)
        request.headers["content-type"] = "application/x-ndjson"
    else:
        value: Any = {"inputs": texts, "model": model.name, "top_k": 2, "truncate": True}
        for _ in range(rng.choice((0, 1, 1, 2))):
            value = mutate(value, rng)
        request = Request(path="/v1/predict", body=json.dumps(value).encode())
        request.headers["content-type"] = rng.choice(
            ["application/json"] * 8 + ["text/plain", "", "a/b;", "\u00e9"]
        )
    if rng.random() < 0.2:
        request.body = scramble(request.body, rng)
    return request


def vary_http(request: Request, rng: random.Random) -> None:
    """Make something about the HTTP around the body unusual or wrong."""
    if rng.random() < 0.3:
        request.framing = rng.choice(FRAMINGS)
    for name, values in HEADERS.items():
        if rng.random() < 0.03:
            request.headers[name] = rng.choice(values)
    if rng.random() < 0.01:
        request.method = rng.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW", "post"])
    if rng.random() < 0.003:
        request.body = request.body.ljust(3 << 20)


def good_requests(model: Model) -> list[Request]:
    """Requests that always have the same answer, bit for bit."""
    rng = random.Random(7)
    requests = []
    for number in range(4):
        body, raw = model.good(rng)
        head = json.dumps(body).encode()
        headers = {"inference-header-content-length": str(len(head))}
        path = f"/v2/models/{model.name}/infer"
        requests.append(
            Request(
                path=path, body=head + raw, headers=headers, answer_key=f"{model.name}, {number}"
            )
        )
    if model.reads_texts:
        body = {"inputs": TEXTS, "model": model.name}
        requests.append(
            Request(
                path="/v1/predict",
                body=json.dumps(body).encode(),
                answer_key=f"{model.name}, texts",
            )
        )
    return requests


def request_of(models: list[Model], rng: random.Random, bombs: list[tuple[str, bytes]]) -> Request:
    """A request for one of the models, usually with mistakes."""
    model = rng.choice(models)
    request = v1_request(model, rng) if rng.random() < 0.2 else v2_request(model, rng, bombs)
    vary_http(request, rng)
    return request
