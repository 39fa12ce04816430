"""Mutated bodies against the application, its models and its engine."""

from __future__ import annotations

import asyncio
import random
import resource
from collections import Counter
from pathlib import Path

import httpx

from evalmode.service.app import create_app
from tests.service.bundles import make_bundle, tensor_bundle
from tests.service.protocol.mutations import CASES, random_body
from tests.service.served import Answer, Served, serving

MAX_GROWTH_KIB = 64 * 1024


def peak_memory_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


async def count_statuses(served: Served, cases: int, chance: random.Random) -> Counter[int]:
    counts: Counter[int] = Counter()
    transport = httpx.ASGITransport(create_app(served.components))
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        for _ in range(cases):
            answer = await send_mutated(client, chance)
            counts[answer.status_code] += 1
            assert answer.status_code in (200, 400, 413), answer.text
            assert answer.status_code == 200 or answer.json().keys() == {"error"}
    return counts


async def send_mutated(client: httpx.AsyncClient, chance: random.Random) -> Answer:
    body = random_body(chance)
    headers = {"accept-encoding": chance.choice(["gzip", "deflate", "identity"])}
    if body.json_length is not None:
        headers["inference-header-content-length"] = body.json_length
    if body.encoding is not None:
        headers["content-encoding"] = body.encoding
    model = "tensors" if b'"x"' in body.head else "tiny"
    return await client.post(f"/v2/models/{model}/infer", content=body.content, headers=headers)


def test_no_body_makes_the_server_fail_or_grow(tmp_path: Path):
    make_bundle(tmp_path)
    tensor_bundle(tmp_path)
    chance = random.Random(5)
    with serving(tmp_path, max_body_bytes=65_536, access_log=0) as served:
        asyncio.run(count_statuses(served, CASES // 5, chance))
        before_kib = peak_memory_kib()
        counts = asyncio.run(count_statuses(served, CASES * 4 // 5, chance))
        assert peak_memory_kib() - before_kib < MAX_GROWTH_KIB
    assert counts[200] > CASES // 30
    assert counts[400] > CASES // 5
    assert counts[413] > 0
