"""Figures of a real server of a bundle: start, memory, latency, and what batching brings. Talks
HTTP only.

    python bench/speed.py bundles/languages/1

Machines are noisy: quote the ratios, which are of one run, and repeat the absolute figures before
relying on them.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time

import aiohttp
from launched import served
from rich.console import Console
from rich.progress import track
from rich.table import Table

STARTS = 5
REQUESTS = 2000
CLIENTS = 16
TEXTS = (
    "Ez egy rövid mondat.",
    "Dit is een zin die iets langer is dan de andere zinnen in deze lijst, en toch niet heel lang.",
    "Это предложение.",
    "Save changes",
    "これは文です。",
    "Une phrase de longueur moyenne, ni plus ni moins.",
)


async def latencies_ms(url: str, *, clients: int, texts: int = 1) -> tuple[list[float], float]:
    """Milliseconds of each of REQUESTS requests of so many texts, from so many clients at once, and
    texts a second.
    """
    every: list[float] = []

    async def client(session: aiohttp.ClientSession, first: int) -> None:
        for number in range(first, REQUESTS, clients):
            inputs = [TEXTS[(number + place) % len(TEXTS)] for place in range(texts)]
            started = time.perf_counter()
            async with session.post("/v1/predict", json={"inputs": inputs}) as answer:
                await answer.read()
                answer.raise_for_status()
            every.append(1000 * (time.perf_counter() - started))

    async with aiohttp.ClientSession(url) as session:
        started = time.perf_counter()
        await asyncio.gather(*(client(session, first) for first in range(clients)))
        return every, REQUESTS * texts / (time.perf_counter() - started)


def main(bundle: str) -> None:
    """Measure and print."""
    starts = []
    for _ in track(range(STARTS), description="start", transient=True):
        with served(bundle) as server:
            starts.append(server.start_s)
            idle_mb = server.resident_mb()
    asked = {
        "1 client, a text a request": (1, 1),
        f"{CLIENTS} clients, a text a request": (CLIENTS, 1),
        f"{4 * CLIENTS} clients, a text a request": (4 * CLIENTS, 1),
        "1 client, 100 texts a request": (1, 100),
    }
    with served(bundle, "--access-log", "0") as server:
        asyncio.run(latencies_ms(server.url, clients=CLIENTS))  # warm
        found = {
            name: asyncio.run(latencies_ms(server.url, clients=clients, texts=texts))
            for name, (clients, texts) in track(
                asked.items(), description="requests", transient=True
            )
        }
        peak_mb = server.resident_mb("VmHWM")
    table = Table("figure", "value", title=f"server of {bundle}", title_justify="left")
    table.add_row("start to ready, median of 5", f"{statistics.median(starts):.2f} s")
    table.add_row("resident memory when ready", f"{idle_mb:.0f} MB")
    table.add_row("resident memory at its highest", f"{peak_mb:.0f} MB")
    for name, (every, rate) in found.items():
        p50, p99 = statistics.median(every), statistics.quantiles(every, n=100)[98]
        table.add_row(name, f"{rate:.0f} texts/s, p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    first, *_, last = (rate for _, rate in found.values())
    table.add_row("ratio: 100 texts a request to one", f"{last / first:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
