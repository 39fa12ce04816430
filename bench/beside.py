"""How long `/livez` takes beside requests of a megabyte: `python bench/beside.py BUNDLE...`.

A kind of request is asked by one client and by four at once, again and again, while `/livez` is
asked every 5 ms on a connection of its own. A probe waits for the event loop, so its slowest answer
shows how long anything else does. Talks HTTP only.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass

import aiohttp
from launched import served
from rich.console import Console
from rich.progress import track
from rich.table import Table

SECONDS = 4
CLIENTS = (1, 4)
PAUSE_S = 0.005
SHORT_TEXT = "Ez egy rövid mondat, és még egy."


def body_of(*texts: str) -> bytes:
    """The body of a request for predictions."""
    return json.dumps({"inputs": texts}, ensure_ascii=False).encode()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of request: its body, and its media type."""

    name: str
    body: bytes
    media_type: str = "application/json"


KINDS = (
    Kind(name="a text of a few words", body=body_of(SHORT_TEXT)),
    Kind(name="a text of 1 MB, of words", body=body_of("some words and more " * 50_000)),
    Kind(name="a text of 1 MB, one word", body=body_of("x" * 1_000_000)),
    Kind(name="a text of 1 MB, blanks", body=body_of(" " * 1_000_000)),
    Kind(name="a text of 1 MB, combining marks", body=body_of("a" + "\u0301\u0316" * 250_000)),
    Kind(name="a text of 1 MB, emoji", body=body_of("👩‍👩‍👧" * 55_000)),
    Kind(name="a text of 1 MB, escaped", body=json.dumps({"inputs": ["é" * 170_000]}).encode()),
    Kind(name="256 texts of 4 kB", body=body_of(*["some words and more " * 200] * 256)),
    Kind(name="256 short texts", body=body_of(*[SHORT_TEXT] * 256)),
    Kind(name="20,000 short texts, refused", body=body_of(*[SHORT_TEXT] * 20_000)),
    Kind(
        name="20,000 short texts, a line each",
        body=(json.dumps(SHORT_TEXT) + "\n").encode() * 20_000,
        media_type="application/x-ndjson",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Milliseconds of the probe and of the request, and how often each was asked."""

    median_ms: float
    p99_ms: float
    slowest_ms: float
    request_ms: float
    requests: int


async def measure(url: str, kind: Kind, *, clients: int) -> Figures:
    """The probe's times beside so many clients that ask for SECONDS."""
    until = time.perf_counter() + SECONDS
    probes: list[float] = []
    requests: list[float] = []

    async def client(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() < until:
            began = time.perf_counter()
            async with session.post(
                "/v1/predict", data=kind.body, headers={"content-type": kind.media_type}
            ) as answer:
                await answer.read()
            requests.append(1000 * (time.perf_counter() - began))

    async def probe(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() < until:
            began = time.perf_counter()
            async with session.get("/livez") as answer:
                await answer.read()
                answer.raise_for_status()
            probes.append(1000 * (time.perf_counter() - began))
            await asyncio.sleep(PAUSE_S)

    async with aiohttp.ClientSession(url) as session:
        await asyncio.gather(probe(session), *(client(session) for _ in range(clients)))
    probes.sort()
    requests.sort()
    return Figures(
        median_ms=probes[len(probes) // 2],
        p99_ms=probes[int(0.99 * len(probes))],
        slowest_ms=probes[-1],
        request_ms=requests[len(requests) // 2],
        requests=len(requests),
    )


def main(bundles: list[str]) -> None:
    """Measure and print."""
    for bundle in bundles:
        table = Table(
            "beside",
            *("clients", "/livez p50", "p99", "slowest", "request p50", "requests"),
            title=f"ms, {bundle}",
            title_justify="left",
        )
        with served(bundle, "--access-log", "0") as server:
            for kind in track(KINDS, description="measuring", transient=True):
                for clients in CLIENTS:
                    figures = asyncio.run(measure(server.url, kind, clients=clients))
                    table.add_row(
                        kind.name,
                        str(clients),
                        f"{figures.median_ms:.1f}",
                        f"{figures.p99_ms:.1f}",
                        f"{figures.slowest_ms:.1f}",
                        f"{figures.request_ms:.1f}",
                        f"{figures.requests:,}",
                    )
            table.caption = f"highest resident memory {server.resident_mb('VmHWM'):.0f} MB"
        Console(width=110).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
