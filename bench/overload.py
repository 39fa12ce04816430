"""Measures what overload does to accepted and to refused requests.

    python bench/overload.py BUNDLE

It finds the capacity with clients that wait for their answers. Then it sends requests at a fixed
rate, whether or not they are answered: at capacity, and at five times the capacity. Use a model so
slow that HTTP is not the bottleneck, for example:

    evalmode train --out runs/slow --width 512 --layers 8 --heads 8 --epochs 1 --max-minutes 1
    evalmode export runs/slow
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field

import aiohttp
from launched import Server, served
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

CLIENTS = 16
OVERLOAD = 5
# With one text, HTTP would be the bottleneck and not the model.
TEXTS_A_REQUEST = 8
TEXTS = (
    (
        "Ez egy hosszabb mondat, amely elég hosszú ahhoz, hogy a modellnek dolga legyen vele, és"
        " még annál is hosszabb."
    ),
    (
        "Dit is een zin die iets langer is dan de andere zinnen in deze lijst, zodat het model er"
        " iets aan te doen heeft."
    ),
    (
        "Это предложение длиннее других предложений, чтобы модели было чем заняться, и ещё немного"
        " длиннее."
    ),
    (
        "Une phrase assez longue pour que le modèle ait quelque chose à faire, et même un peu plus"
        " longue que cela."
    ),
)


@dataclass(kw_only=True)
class Answers:
    """The milliseconds of each answer by its status. Status 0 is a failed connection."""

    seconds: float = 0.0
    by_status: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def p99_ms(self, status: int) -> float:
        """The 99th percentile of the answers with this status."""
        return statistics.quantiles(self.by_status[status], n=100)[98]

    def per_s(self) -> float:
        """Answers with status 200 per second."""
        return len(self.by_status[200]) / self.seconds


async def ask(session: aiohttp.ClientSession, number: int, answers: Answers) -> None:
    """Send one request, and record its time."""
    texts = [TEXTS[(number + index) % len(TEXTS)] for index in range(TEXTS_A_REQUEST)]
    started = time.perf_counter()
    try:
        async with session.post("/v1/predict", json={"inputs": texts}) as answer:
            await answer.read()
            status = answer.status
    except aiohttp.ClientError:
        status = 0
    answers.by_status[status].append(1000 * (time.perf_counter() - started))


async def closed_loop(server: Server, *, seconds: float) -> Answers:
    """CLIENTS clients that send the next request when they have an answer."""
    answers, until = Answers(), time.perf_counter() + seconds

    async def client(session: aiohttp.ClientSession, first: int) -> None:
        for number in itertools.count(first):
            if time.perf_counter() >= until:
                return
            await ask(session, number, answers)

    async with aiohttp.ClientSession(
        server.url, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        await asyncio.gather(*(client(session, first) for first in range(CLIENTS)))
    answers.seconds = seconds
    return answers


async def open_loop(server: Server, *, rate_per_s: float, seconds: float, title: str) -> Answers:
    """Requests at random times (a Poisson process) of this rate, answered or not."""
    answers, rng = Answers(seconds=seconds), random.Random(0)
    async with aiohttp.ClientSession(
        server.url, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        started = due = time.perf_counter()
        requests = []
        with Progress(transient=True) as progress:
            bar = progress.add_task(title, total=seconds)
            for number in itertools.count():
                due += rng.expovariate(rate_per_s)
                if due > started + seconds:
                    break
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                requests.append(asyncio.create_task(ask(session, number, answers)))
                progress.update(bar, completed=due - started)
            await asyncio.gather(*requests)
    return answers


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument(
        "--parallel", default="1", help="parallel batches: leave a core to the clients"
    )
    arguments = parser.parse_args()
    with served(arguments.bundle, "--access-log", "0", "--parallel", arguments.parallel) as server:
        asyncio.run(closed_loop(server, seconds=3))  # warm up
        capacity = asyncio.run(closed_loop(server, seconds=10)).per_s()
        at_capacity = asyncio.run(
            open_loop(
                server, rate_per_s=capacity, seconds=arguments.seconds / 2, title="at capacity"
            )
        )
        before_mb = server.resident_mb()
        rate = OVERLOAD * capacity
        overload = asyncio.run(
            open_loop(server, rate_per_s=rate, seconds=arguments.seconds, title="overload")
        )
        after_mb = server.resident_mb()
    table = Table("figure", "value", title=f"overload of {arguments.bundle}", title_justify="left")
    table.add_row("capacity", f"{capacity:.0f} requests/s")
    for name, answers in (
        ("at capacity", at_capacity),
        (f"at {OVERLOAD} times capacity", overload),
    ):
        table.add_row(
            f"{name}: answered",
            f"{answers.per_s():.0f} requests/s, p99 {answers.p99_ms(200):.0f} ms",
        )
        for status, latencies_ms in sorted(answers.by_status.items()):
            table.add_row(
                f"{name}: status {status}",
                f"{len(latencies_ms):,}, median {statistics.median(latencies_ms):.1f} ms",
            )
    table.add_row(
        "ratio of the p99 of answered requests",
        f"{overload.p99_ms(200) / at_capacity.p99_ms(200):.2f}",
    )
    if 503 in overload.by_status:
        table.add_row("p99 of a refusal", f"{overload.p99_ms(503):.1f} ms")
    table.add_row("resident memory before and after", f"{before_mb:.0f} MB, {after_mb:.0f} MB")
    Console().print(table)


if __name__ == "__main__":
    main()
