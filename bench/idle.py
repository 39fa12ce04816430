"""What a thousand connections that say nothing cost the others: `python bench/idle.py BUNDLE`.
Talks HTTP only.
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


async def latencies_ms(server: Server) -> list[float]:
    """Milliseconds of each of REQUESTS requests from a few clients."""
    found: list[float] = []

    async def client(session: aiohttp.ClientSession) -> None:
        for _ in range(REQUESTS // CLIENTS):
            started = time.perf_counter()
            async with session.post("/v1/predict", json={"inputs": [TEXT]}) as answer:
                await answer.read()
                assert answer.status == 200
            found.append(1000 * (time.perf_counter() - started))

    async with aiohttp.ClientSession(server.url) as session:
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
    return found


async def measure(server: Server) -> dict[str, list[float]]:
    """Alone, beside the idle ones, and alone again: the machine may have changed meanwhile."""
    address = urlsplit(server.url)
    await latencies_ms(server)  # warm
    found = {"alone": await latencies_ms(server)}
    idle = [await asyncio.open_connection(address.hostname, address.port) for _ in range(IDLE)]
    found[f"beside {IDLE} idle connections"] = await latencies_ms(server)
    for _, writer in idle:
        writer.close()
    found["alone again"] = await latencies_ms(server)
    return found


def main(bundle: str) -> None:
    """Measure and print."""
    with served(bundle, "--access-log", "0", "--header-timeout-s", "600") as server:
        found = asyncio.run(measure(server))
    table = Table(
        "", "p50", "p99", "p99 to alone", title=f"idle connections at a server of {bundle}"
    )
    first = statistics.quantiles(found["alone"], n=100)[98]
    for name, every in found.items():
        p99 = statistics.quantiles(every, n=100)[98]
        table.add_row(
            name, f"{statistics.median(every):.1f} ms", f"{p99:.1f} ms", f"{p99 / first:.2f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
