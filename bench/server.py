"""Figures of a real server of a bundle: start, memory, latency, and what batching brings. Talks HTTP only.

    python bench/server.py bundles/languages/1

Machines are noisy: quote the ratios, which are of one run, and repeat the absolute figures before relying on them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
from rich.console import Console
from rich.progress import track
from rich.table import Table
from serving import served

STARTS = 5
REQUESTS = 1000
CLIENTS = 16
TEXTS = (
    "Ez egy rövid mondat.",
    "Dit is een zin die iets langer is dan de andere zinnen in deze lijst, en toch niet heel lang.",
    "Это предложение.",
    "Save changes",
    "これは文です。",
    "Une phrase de longueur moyenne, ni plus ni moins.",
)


def latencies_ms(ask: Callable[[int], object], *, clients: int, title: str) -> tuple[list[float], float]:
    """Milliseconds of each of REQUESTS requests from so many clients at once, and requests a second."""

    def timed(number: int) -> float:
        started = time.perf_counter()
        ask(number)
        return 1000 * (time.perf_counter() - started)

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        every = list(track(pool.map(timed, range(REQUESTS)), total=REQUESTS, description=title, transient=True))
    return every, REQUESTS / (time.perf_counter() - started)


def main(bundle: str) -> None:
    """Measure and print."""
    starts = []
    for _ in track(range(STARTS), description="start", transient=True):
        with served(bundle) as server:
            starts.append(server.start_s)
            idle_mb = server.resident_mb()
    with served(bundle, "--access-log", "0") as server, httpx.Client(base_url=server.url) as client:

        def post(texts: list[str]) -> None:
            client.post("/v1/predict", json={"inputs": texts}).raise_for_status()

        alone, alone_per_s = latencies_ms(lambda n: post([TEXTS[n % len(TEXTS)]]), clients=1, title="one client")
        many, many_per_s = latencies_ms(lambda n: post([TEXTS[n % len(TEXTS)]]), clients=CLIENTS, title="many clients")
        started = time.perf_counter()
        for first in range(0, REQUESTS, 100):
            post([TEXTS[n % len(TEXTS)] for n in range(first, first + 100)])
        in_batches_per_s = REQUESTS / (time.perf_counter() - started)
        peak_mb = server.resident_mb("VmHWM")
    table = Table("figure", "value", title=f"server of {bundle}", title_justify="left")
    table.add_row("start to ready, median of 5", f"{statistics.median(starts):.2f} s")
    table.add_row("resident memory when ready", f"{idle_mb:.0f} MB")
    table.add_row("resident memory at its highest", f"{peak_mb:.0f} MB")
    for name, every, rate in (("1 client", alone, alone_per_s), (f"{CLIENTS} clients", many, many_per_s)):
        p50, p99 = statistics.median(every), statistics.quantiles(every, n=100)[98]
        table.add_row(f"{name}, a text a request", f"{rate:.0f} texts/s, p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    table.add_row("1 client, 100 texts a request", f"{in_batches_per_s:.0f} texts/s")
    table.add_row("ratio: 100 texts a request to one", f"{in_batches_per_s / alone_per_s:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
