"""Mutated bodies: each is a request or a sentence, nothing else, and takes little memory."""

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
from evalmode.service.protocol.compression import decompressed, encoding_of
from evalmode.service.protocol.request import InferRequest, parse_infer
from evalmode.service.protocol.response import OutputTensor, encode_response
from tests.service.protocol.mutations import CASES, Body, case, good

BATCHES = 5
MAX_BODY_BYTES = 65_536
# of Python's objects, for the worst body of 64 KiB: lists of empty lists
MAX_MEMORY_BYTES = 16 << 20

_SPECS = [
    None,
    TensorSpec(name="text", datatype="BYTES", shape=(-1,)),
    TensorSpec(name="x", datatype="FP32", shape=(-1, 4)),
    TensorSpec(name="x", datatype="INT64", shape=(-1, -1)),
    TensorSpec(name="x", datatype="BOOL", shape=()),
]


async def outcome(body: Body, chance: random.Random) -> InferRequest | RequestError:
    async def sent() -> AsyncIterator[bytes]:
        packed, size = body.sent, chance.choice([7, 1000, 10**6])
        for place in range(0, len(packed), size):
            yield packed[place : place + size]

    try:
        encoding = encoding_of([body.encoding] if body.encoding is not None else [])
        chunks = sent() if encoding is None else decompressed(sent(), encoding)
        plain = await read_body(
            chunks, declared_bytes=None, max_body_bytes=MAX_BODY_BYTES, silence_s=30
        )
        return parse_infer(
            plain, json_length=body.json_length, max_top_k=10, only_input=chance.choice(_SPECS)
        )
    except RequestError as error:
        return error


@pytest.mark.parametrize("seed", range(BATCHES))
def test_a_mutated_body_is_a_request_or_a_sentence_and_takes_little_memory(seed: int):
    chance = random.Random(seed)

    async def all_of_them() -> list[bool]:
        understood = []
        for _ in range(CASES // BATCHES):
            body = case(chance)
            tracemalloc.reset_peak()
            before_bytes, _ = tracemalloc.get_traced_memory()
            found = await outcome(body, chance)
            _, peak_bytes = tracemalloc.get_traced_memory()
            assert peak_bytes - before_bytes < MAX_MEMORY_BYTES, body
            understood.append(isinstance(found, InferRequest))
            if isinstance(found, RequestError):
                assert found.status in (400, 413, 415), body
                assert 0 < len(str(found)) < 1000, body
        return understood

    tracemalloc.start()
    understood = asyncio.run(all_of_them())
    tracemalloc.stop()
    assert 0.05 < sum(understood) / len(understood) < 0.8  # both ends are reached


def test_what_was_understood_can_be_written_again():
    chance = random.Random(99)
    for _ in range(200):
        found, raw = good(chance)
        head = json.dumps(found).encode()
        request = parse_infer(head + raw, json_length=str(len(head)), max_top_k=10)
        tensors = [
            OutputTensor(name=tensor.name, data=tensor.data, binary=chance.random() < 0.5)
            for tensor in request.inputs
        ]
        encoded = encode_response(tensors, model_name="m", model_version="1", digest="0")
        again = json.loads(encoded.body[: encoded.json_length])["outputs"]
        assert [(output["name"], output["datatype"], output["shape"]) for output in again] == [
            (tensor["name"], tensor["datatype"], tensor["shape"]) for tensor in found["inputs"]
        ]
