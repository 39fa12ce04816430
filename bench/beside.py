"""Measures how long `/livez` takes beside requests of a megabyte.

    python bench/beside.py BUNDLE...

One client, and then four at once, repeat one kind of request. Meanwhile a separate connection asks
`/livez` every 5 ms. A probe waits for the event loop, so the slowest one shows the longest pause of
the loop.
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
    """The milliseconds of the probes and of the requests, and how many requests there were."""

    median_ms: float
    p99_ms: float
    slowest_ms: float
    request_ms: float
    requests: int


async def measure(url: str, kind: Kind, *, clients: int) -> Figures:
    """The times of the probes beside `clients` clients that send requests for SECONDS."""
    deadline = time.perf_counter() + SECONDS
    probes_ms: list[float] = []
    requests_ms: list[float] = []

    async def client(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() < deadline:
            started = time.perf_counter()
            async with session.post(
                "/v1/predict", data=kind.body, headers={"content-type": kind.media_type}
            ) as response:
                await response.read()
            requests_ms.append(1000 * (time.perf_counter() - started))

    async def probe(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() < deadline:
            started = time.perf_counter()
            async with session.get("/livez") as response:
                await response.read()
                response.raise_for_status()
            probes_ms.append(1000 * (time.perf_counter() - started))
            await asyncio.sleep(PAUSE_S)

    async with aiohttp.ClientSession(url) as session:
        await asyncio.gather(probe(session), *(client(session) for _ in range(clients)))
    probes_ms.sort()
    requests_ms.sort()
    return Figures(
        median_ms=probes_ms[len(probes_ms) // 2],
        p99_ms=probes_ms[int(0.99 * len(probes_ms))],
        slowest_ms=probes_ms[-1],
        request_ms=requests_ms[len(requests_ms) // 2],
        requests=len(requests_ms),
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
