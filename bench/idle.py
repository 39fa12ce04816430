"""Measures what a thousand idle connections cost the other clients of a server.

python bench/idle.py BUNDLE
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from urllib.parse import urlsplit

import aiohttp
from launched import Server, served
from rich.console import Console
from rich.table import Table

IDLE = 1000
CLIENTS = 8
REQUESTS = 4000
TEXT = "Dit is een zin die iets langer is dan de andere zinnen."


async def measure_latencies_ms(server: Server) -> list[float]:
    """The milliseconds of each of REQUESTS requests from CLIENTS clients."""
    latencies_ms: list[float] = []

    async def client(session: aiohttp.ClientSession) -> None:
        for _ in range(REQUESTS // CLIENTS):
            started = time.perf_counter()
            async with session.post("/v1/predict", json={"inputs": [TEXT]}) as response:
                await response.read()
                assert response.status == 200
            latencies_ms.append(1000 * (time.perf_counter() - started))

    async with aiohttp.ClientSession(server.url) as session:
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
    return latencies_ms


async def measure(server: Server) -> dict[str, list[float]]:
    """Latencies alone, beside idle connections, and alone again.

    The last ones show whether the machine itself has changed meanwhile.
    """
    address = urlsplit(server.url)
    await measure_latencies_ms(server)  # warm up
    latencies_ms = {"alone": await measure_latencies_ms(server)}
    idle = [await asyncio.open_connection(address.hostname, address.port) for _ in range(IDLE)]
    latencies_ms[f"beside {IDLE} idle connections"] = await measure_latencies_ms(server)
    for _, writer in idle:
        writer.close()
    latencies_ms["alone again"] = await measure_latencies_ms(server)
    return latencies_ms


def main(bundle: str) -> None:
    """Measure and print."""
    # The long timeout keeps the idle connections open.
    with served(bundle, "--access-log", "0", "--header-timeout-s", "600") as server:
        by_case = asyncio.run(measure(server))
    table = Table(
        "", "p50", "p99", "p99 to alone", title=f"idle connections at a server of {bundle}"
    )
    alone_p99_ms = statistics.quantiles(by_case["alone"], n=100)[98]
    for name, latencies_ms in by_case.items():
        p50_ms = statistics.median(latencies_ms)
        p99_ms = statistics.quantiles(latencies_ms, n=100)[98]
        table.add_row(name, f"{p50_ms:.1f} ms", f"{p99_ms:.1f} ms", f"{p99_ms / alone_p99_ms:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
