"""Measures a real server of a bundle: its start, memory and latency, and the gain of batching.

    python bench/speed.py bundles/languages/1

Machines are noisy. Quote the ratios, which come from one run, and repeat absolute figures before
you rely on them.
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


async def measure_latencies(url: str, *, clients: int, texts: int = 1) -> tuple[list[float], float]:
    """The milliseconds of each of REQUESTS requests, and the texts per second.

    Each request has `texts` texts, and `clients` clients send them at once.
    """
    latencies_ms: list[float] = []

    async def client(session: aiohttp.ClientSession, first: int) -> None:
        for number in range(first, REQUESTS, clients):
            inputs = [TEXTS[(number + index) % len(TEXTS)] for index in range(texts)]
            started = time.perf_counter()
            async with session.post("/v1/predict", json={"inputs": inputs}) as response:
                await response.read()
                response.raise_for_status()
            latencies_ms.append(1000 * (time.perf_counter() - started))

    async with aiohttp.ClientSession(url) as session:
        started = time.perf_counter()
        await asyncio.gather(*(client(session, first) for first in range(clients)))
        return latencies_ms, REQUESTS * texts / (time.perf_counter() - started)


def main(bundle: str) -> None:
    """Measure and print."""
    starts = []
    for _ in track(range(STARTS), description="start", transient=True):
        with served(bundle) as server:
            starts.append(server.start_s)
            idle_mb = server.resident_mb()
    cases = {
        "1 client, a text a request": (1, 1),
        f"{CLIENTS} clients, a text a request": (CLIENTS, 1),
        f"{4 * CLIENTS} clients, a text a request": (4 * CLIENTS, 1),
        "1 client, 100 texts a request": (1, 100),
    }
    with served(bundle, "--access-log", "0") as server:
        asyncio.run(measure_latencies(server.url, clients=CLIENTS))  # warm up
        results = {}
        for name, (clients, texts) in track(cases.items(), description="requests", transient=True):
            results[name] = asyncio.run(measure_latencies(server.url, clients=clients, texts=texts))
        peak_mb = server.resident_mb("VmHWM")
    table = Table("figure", "value", title=f"server of {bundle}", title_justify="left")
    table.add_row("start to ready, median of 5", f"{statistics.median(starts):.2f} s")
    table.add_row("resident memory when ready", f"{idle_mb:.0f} MB")
    table.add_row("resident memory at its highest", f"{peak_mb:.0f} MB")
    for name, (latencies_ms, rate) in results.items():
        p50_ms = statistics.median(latencies_ms)
        p99_ms = statistics.quantiles(latencies_ms, n=100)[98]
        table.add_row(name, f"{rate:.0f} texts/s, p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms")
    first, *_, last = (rate for _, rate in results.values())
    table.add_row("ratio: 100 texts a request to one", f"{last / first:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
