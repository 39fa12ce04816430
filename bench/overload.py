"""What overload does to those who are served and to those who are not: `python bench/overload.py
BUNDLE`.

Finds the capacity with clients that wait for their answers, then offers requests at a fixed rate,
answered or not: at capacity, then at five times it. Take a model so slow that HTTP is not the
bottleneck, for instance

    evalmode train --out runs/slow --width 512 --layers 8 --heads 8 --epochs 1 --max-minutes 1
    evalmode export runs/slow

Talks HTTP only.
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
TEXTS_A_REQUEST = 8  # so that the model is what is slow, and not HTTP
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
    """Milliseconds of each answer by its status; 0 stands for a connection that failed."""

    seconds: float = 0.0
    by_status: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def p99_ms(self, status: int) -> float:
        """The 99th percentile of the answers with this status."""
        return statistics.quantiles(self.by_status[status], n=100)[98]

    def per_s(self) -> float:
        """Answers with status 200 a second."""
        return len(self.by_status[200]) / self.seconds


async def ask(session: aiohttp.ClientSession, number: int, answers: Answers) -> None:
    """One request, timed."""
    texts = [TEXTS[(number + place) % len(TEXTS)] for place in range(TEXTS_A_REQUEST)]
    started = time.perf_counter()
    try:
        async with session.post("/v1/predict", json={"inputs": texts}) as answer:
            await answer.read()
            status = answer.status
    except aiohttp.ClientError:
        status = 0
    answers.by_status[status].append(1000 * (time.perf_counter() - started))


async def closed_loop(server: Server, *, seconds: float) -> Answers:
    """So many clients, each of which asks again when it was answered."""
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
    """Requests at random times (a Poisson process) of this rate, whatever becomes of those
    before.
    """
    answers, chance = Answers(seconds=seconds), random.Random(0)
    async with aiohttp.ClientSession(
        server.url, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        started = due = time.perf_counter()
        asked = []
        with Progress(transient=True) as progress:
            bar = progress.add_task(title, total=seconds)
            for number in itertools.count():
                due += chance.expovariate(rate_per_s)
                if due > started + seconds:
                    break
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                asked.append(asyncio.create_task(ask(session, number, answers)))
                progress.update(bar, completed=due - started)
            await asyncio.gather(*asked)
    return answers


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("bundle")
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument(
        "--parallel", default="1", help="batches at once: leave a core to whoever asks"
    )
    asked = options.parse_args()
    with served(asked.bundle, "--access-log", "0", "--parallel", asked.parallel) as server:
        asyncio.run(closed_loop(server, seconds=3))  # warm
        capacity = asyncio.run(closed_loop(server, seconds=10)).per_s()
        at = asyncio.run(
            open_loop(server, rate_per_s=capacity, seconds=asked.seconds / 2, title="at capacity")
        )
        before_mb = server.resident_mb()
        rate = OVERLOAD * capacity
        over = asyncio.run(
            open_loop(server, rate_per_s=rate, seconds=asked.seconds, title="overload")
        )
        after_mb = server.resident_mb()
    table = Table("figure", "value", title=f"overload of {asked.bundle}", title_justify="left")
    table.add_row("capacity", f"{capacity:.0f} requests/s")
    for name, answers in (("at capacity", at), (f"at {OVERLOAD} times capacity", over)):
        table.add_row(
            f"{name}: answered",
            f"{answers.per_s():.0f} requests/s, p99 {answers.p99_ms(200):.0f} ms",
        )
        for status, every in sorted(answers.by_status.items()):
            table.add_row(
                f"{name}: status {status}",
                f"{len(every):,}, median {statistics.median(every):.1f} ms",
            )
    table.add_row("ratio of the p99 of those answered", f"{over.p99_ms(200) / at.p99_ms(200):.2f}")
    if 503 in over.by_status:
        table.add_row("p99 of a refusal", f"{over.p99_ms(503):.1f} ms")
    table.add_row("resident memory before and after", f"{before_mb:.0f} MB, {after_mb:.0f} MB")
    Console().print(table)


if __name__ == "__main__":
    main()
