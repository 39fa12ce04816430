"""Mutated bodies: each is parsed or refused with a sentence, and takes little memory."""

from __future__ import annotations

import asyncio
import json
import random
import tracemalloc
from collections.abc import AsyncIterator

import pytest

from evalmode.bundle.manifest import TensorSpec
from evalmode.service.errors import RequestError
from evalmode.service.http.body import read_body
from evalmode.service.protocol.compression import declared_encoding, decompress
from evalmode.service.protocol.request import InferRequest, parse_infer_request
from evalmode.service.protocol.response import OutputTensor, encode_response
from tests.service.protocol.mutations import CASES, Body, random_body, valid_request

BATCHES = 5
MAX_BODY_BYTES = 65_536
# The worst body of 64 KiB is lists of empty lists, which are Python objects.
MAX_MEMORY_BYTES = 16 << 20

_SPECS = [
    None,
    TensorSpec(name="text", datatype="BYTES", shape=(-1,)),
    TensorSpec(name="x", datatype="FP32", shape=(-1, 4)),
    TensorSpec(name="x", datatype="INT64", shape=(-1, -1)),
    TensorSpec(name="x", datatype="BOOL", shape=()),
]


async def outcome(body: Body, chance: random.Random) -> InferRequest | RequestError:
    async def stream() -> AsyncIterator[bytes]:
        content, size = body.content, chance.choice([7, 1000, 10**6])
        for start in range(0, len(content), size):
            yield content[start : start + size]

    try:
        encoding = declared_encoding([body.encoding] if body.encoding is not None else [])
        chunks = stream() if encoding is None else decompress(stream(), encoding)
        plain = await read_body(
            chunks, declared_bytes=None, max_body_bytes=MAX_BODY_BYTES, silence_s=30
        )
        return parse_infer_request(
            plain, json_length=body.json_length, max_top_k=10, only_input=chance.choice(_SPECS)
        )
    except RequestError as error:
        return error


@pytest.mark.parametrize("seed", range(BATCHES))
def test_a_mutated_body_is_parsed_or_refused_and_takes_little_memory(seed: int):
    chance = random.Random(seed)

    async def parse_all() -> list[bool]:
        accepted = []
        for _ in range(CASES // BATCHES):
            body = random_body(chance)
            tracemalloc.reset_peak()
            before_bytes, _ = tracemalloc.get_traced_memory()
            result = await outcome(body, chance)
            _, peak_bytes = tracemalloc.get_traced_memory()
            assert peak_bytes - before_bytes < MAX_MEMORY_BYTES, body
            accepted.append(isinstance(result, InferRequest))
            if isinstance(result, RequestError):
                assert result.status in (400, 413, 415), body
                assert 0 < len(str(result)) < 1000, body
        return accepted

    tracemalloc.start()
    accepted = asyncio.run(parse_all())
    tracemalloc.stop()
    assert 0.05 < sum(accepted) / len(accepted) < 0.8  # many are parsed and many are refused


def test_parsed_tensors_can_be_written_again():
    chance = random.Random(99)
    for _ in range(200):
        fields, raw = valid_request(chance)
        head = json.dumps(fields).encode()
        request = parse_infer_request(head + raw, json_length=str(len(head)), max_top_k=10)
        tensors = [
            OutputTensor(name=tensor.name, data=tensor.data, binary=chance.random() < 0.5)
            for tensor in request.inputs
        ]
        encoded = encode_response(tensors, model_name="m", model_version="1", digest="0")
        written = json.loads(encoded.body[: encoded.json_length])["outputs"]
        assert [(output["name"], output["datatype"], output["shape"]) for output in written] == [
            (tensor["name"], tensor["datatype"], tensor["shape"]) for tensor in fields["inputs"]
        ]
