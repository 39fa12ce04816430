"""Figures of a real server of a bundle: start, memory, latency, and what batching brings. Talks HTTP only.

    python bench/server.py bundles/languages/1

Machines are noisy: quote the ratios, which are of one run, and repeat the absolute figures before relying on them.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import track
from rich.table import Table

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


@contextmanager
def served(bundle: str) -> Iterator[tuple[str, subprocess.Popen[str], float]]:
    """A server on a free port: its address, its process, and the seconds from its start until it was ready."""
    started = time.perf_counter()
    command = [Path(sys.executable).with_name("evalmode"), "serve", bundle, "--port", "0"]
    with (
        tempfile.NamedTemporaryFile("w+") as log,
        subprocess.Popen(command, stderr=log, text=True, env={**os.environ, "EVALMODE_LOG_FORMAT": "json"}) as process,
    ):
        try:
            while not (found := re.search(r'"url": "([^"]+)"', Path(log.name).read_text())):
                if process.poll() is not None:
                    sys.exit(Path(log.name).read_text())
                time.sleep(0.002)  # the resolution of the figure
            httpx.get(f"{found[1]}/readyz").raise_for_status()
            yield found[1], process, time.perf_counter() - started
        finally:
            process.terminate()


def resident_mb(process: subprocess.Popen[str], field: str) -> float:
    """VmRSS or VmHWM of a process, in megabytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


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
        with served(bundle) as (_, process, seconds):
            starts.append(seconds)
            idle_mb = resident_mb(process, "VmRSS")
    with served(bundle) as (url, process, _), httpx.Client(base_url=url) as client:

        def post(texts: list[str]) -> None:
            client.post("/v1/predict", json={"inputs": texts}).raise_for_status()

        alone, alone_per_s = latencies_ms(lambda n: post([TEXTS[n % len(TEXTS)]]), clients=1, title="one client")
        many, many_per_s = latencies_ms(lambda n: post([TEXTS[n % len(TEXTS)]]), clients=CLIENTS, title="many clients")
        started = time.perf_counter()
        for first in range(0, REQUESTS, 100):
            post([TEXTS[n % len(TEXTS)] for n in range(first, first + 100)])
        in_batches_per_s = REQUESTS / (time.perf_counter() - started)
        peak_mb = resident_mb(process, "VmHWM")
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
