"""Every answer under chaos against the answer computed alone, bit for bit: `python bench/chaos.py
BUNDLE`.

A server of several workers is asked random mixtures of texts, in random numbers, by a random number
of clients, while its model is swapped for the same one and its workers are killed. Exit code 1 for
a single wrong or missing answer. Talks HTTP only, but for the answers alone: those come from the
predictor of `evalmode predict`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from launched import served
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from evalmode.bundle.store import find_bundle
from evalmode.service.predictor import Predictor

TEXTS = 400
CLIENTS = 256
WORDS = (
    "Ez",
    "egy",
    "rövid",
    "mondat",
    "Dit",
    "is",
    "een",
    "Это",
    "の",
    "です",
    "2026",
    "long-winded",
    "œuvre",
    "👍",
    "ﷺ",
)


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """One run: where it is asked, what must come out, and what came."""

    url: str
    texts: list[str]
    alone: list[str]
    chance: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    clients: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(CLIENTS))

    async def ask(self, client: httpx.AsyncClient, places: list[int]) -> None:
        """One request, until it is answered; a worker that was killed, or a full queue, makes it
        come again.
        """
        body = json.dumps({"inputs": [self.texts[place] for place in places]})
        async with self.clients:
            while True:
                try:
                    answer = await client.post(f"{self.url}/v1/predict", content=body)
                except httpx.TransportError:
                    self.counts["connections lost to a killed worker"] += 1
                    continue
                if answer.status_code != 503:
                    break
                self.counts["refused with Retry-After"] += 1
                await asyncio.sleep(float(answer.headers["retry-after"]) * self.chance.random())
        self.counts["requests"] += 1
        if answer.status_code != 200:
            self.counts[f"status {answer.status_code}"] += 1
            return
        for place, found in zip(places, answer.json()["predictions"], strict=True):
            self.counts["answers"] += 1
            self.counts["wrong answers"] += json.dumps(found) != self.alone[place]


def some_texts(chance: random.Random) -> list[str]:
    """Texts of every length, empty and far too long ones among them."""
    lengths = [chance.choice((1, 3, 8, 20, 60)) for _ in range(TEXTS - 2)]
    return [
        "",
        "x" * 5_000,
        *(" ".join(chance.choices(WORDS, k=chance.randint(1, length))) for length in lengths),
    ]


def answered_alone(bundle: Path, texts: list[str]) -> list[str]:
    """The answer to each text when nothing else is asked, as the server would write it."""
    with Predictor.open(bundle, parallel=1) as predictor:
        found = [predictor.predict([text])[0] for text in texts]
    return [
        json.dumps(
            {
                "label": one.label,
                "score": one.score,
                "truncated": one.truncated,
                "top": [{"label": scored.label, "score": scored.score} for scored in one.top],
            }
        )
        for one in found
    ]


async def disturbances(chaos: Chaos, model: Path, pid: int) -> None:
    """Swap the model, and kill a worker, again and again."""
    for turn in range(1_000_000):
        await asyncio.sleep(1 + 2 * chaos.chance.random())
        os.utime(model)  # the same bytes, newly written: every worker opens them again
        chaos.counts["hot swaps"] += 1
        if turn % 3 == 2:
            listing = Path(f"/proc/{pid}/task/{pid}/children")
            children = listing.read_text().split()  # noqa: ASYNC240 - /proc answers at once
            if len(children) > 1:
                os.kill(int(chaos.chance.choice(children)), signal.SIGKILL)
                chaos.counts["workers killed"] += 1


async def storm(chaos: Chaos, *, answers: int, model: Path, pid: int) -> None:
    """Ask until so many answers came."""
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        disturbing = asyncio.create_task(disturbances(chaos, model, pid))
        with Progress(transient=True) as progress:
            bar = progress.add_task("answers", total=answers)
            while chaos.counts["answers"] < answers:
                at_once = chaos.chance.randint(1, CLIENTS)
                rows = [chaos.chance.choice((1, 1, 1, 2, 5, 17, 64)) for _ in range(at_once)]
                await asyncio.gather(
                    *(
                        chaos.ask(client, chaos.chance.choices(range(len(chaos.texts)), k=count))
                        for count in rows
                    )
                )
                progress.update(bar, completed=chaos.counts["answers"])
        disturbing.cancel()
        await asyncio.gather(disturbing, return_exceptions=True)


def main() -> int:
    """Run, and show what was counted."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("bundle", type=Path)
    options.add_argument("--answers", type=int, default=100_000)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    asked = options.parse_args()
    chance = random.Random(asked.seed)
    texts = some_texts(chance)
    with tempfile.TemporaryDirectory() as root:
        bundle = Path(root) / "model" / "1"
        shutil.copytree(find_bundle(asked.bundle), bundle)
        alone = answered_alone(bundle, texts)
        with served(
            root, "--workers", str(asked.workers), "--poll-s", "0.2", "--access-log", "0"
        ) as server:
            chaos = Chaos(url=server.url, texts=texts, alone=alone, chance=chance)
            asyncio.run(
                storm(
                    chaos,
                    answers=asked.answers,
                    model=bundle / "model.onnx",
                    pid=server.process.pid,
                )
            )
            failures = chaos.counts["wrong answers"] + sum(
                count for name, count in chaos.counts.items() if name.startswith("status")
            )
    table = Table("", "count", title=f"chaos of seed {asked.seed}", title_justify="left")
    for name, count in sorted(chaos.counts.items()):
        table.add_row(name, f"{count:,}")
    Console().print(table)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
