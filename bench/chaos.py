"""Compares every answer under chaos with the answer to the text alone, bit for bit.

    python bench/chaos.py BUNDLE

A random number of clients sends random mixtures of texts to a server of several workers. Meanwhile
the model is swapped for the same one, and workers are killed. The exit code is 1 after a single
wrong or missing answer. The expected answers come from the predictor of `evalmode predict`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
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

TEXT_COUNT = 400
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
    """One run: the server, the texts with their expected answers as JSON, and the counts."""

    url: str
    texts: list[str]
    expected: list[str]
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    clients: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(CLIENTS))

    async def ask(self, client: httpx.AsyncClient, indices: list[int]) -> None:
        """Send the texts at `indices` in one request, and compare the answers.

        The request is repeated after a killed worker, and after a full queue.
        """
        body = json.dumps({"inputs": [self.texts[index] for index in indices]})
        async with self.clients:
            while True:
                try:
                    response = await client.post(f"{self.url}/v1/predict", content=body)
                except httpx.TransportError:
                    self.counts["connections lost to a killed worker"] += 1
                    continue
                if response.status_code != 503:
                    break
                self.counts["refused with Retry-After"] += 1
                await asyncio.sleep(float(response.headers["retry-after"]) * self.rng.random())
        self.counts["requests"] += 1
        if response.status_code != 200:
            self.counts[f"status {response.status_code}"] += 1
            return
        for index, prediction in zip(indices, response.json()["predictions"], strict=True):
            self.counts["answers"] += 1
            self.counts["wrong answers"] += json.dumps(prediction) != self.expected[index]


def random_texts(rng: random.Random) -> list[str]:
    """Texts of many lengths. One is empty, and one is far too long."""
    lengths = [rng.choice((1, 3, 8, 20, 60)) for _ in range(TEXT_COUNT - 2)]
    phrases = [" ".join(rng.choices(WORDS, k=rng.randint(1, length))) for length in lengths]
    return ["", "x" * 5_000, *phrases]


def answers_alone(bundle: Path, texts: list[str]) -> list[str]:
    """The answer to each text alone, as the JSON that a server would write."""
    answers = []
    with Predictor.open(bundle, parallel=1) as predictor:
        for text in texts:
            (prediction,) = predictor.predict([text])
            answer = {
                "label": prediction.label,
                "score": prediction.score,
                "truncated": prediction.truncated,
                "top": [
                    {"label": scored.label, "score": scored.score} for scored in prediction.top
                ],
            }
            answers.append(json.dumps(answer))
    return answers


async def disturb(chaos: Chaos, model: Path, pid: int) -> None:
    """Swap the model, and kill a worker at every third swap, for ever."""
    for swap in itertools.count(1):
        await asyncio.sleep(1 + 2 * chaos.rng.random())
        # The file has a new time: every worker opens the same bytes again.
        os.utime(model)
        chaos.counts["hot swaps"] += 1
        if swap % 3 == 0:
            children = Path(f"/proc/{pid}/task/{pid}/children")
            workers = children.read_text().split()  # noqa: ASYNC240 - /proc answers at once
            if len(workers) > 1:
                os.kill(int(chaos.rng.choice(workers)), signal.SIGKILL)
                chaos.counts["workers killed"] += 1


async def storm(chaos: Chaos, *, answers: int, model: Path, pid: int) -> None:
    """Send requests until there are so many answers."""
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        disturbing = asyncio.create_task(disturb(chaos, model, pid))
        with Progress(transient=True) as progress:
            bar = progress.add_task("answers", total=answers)
            while chaos.counts["answers"] < answers:
                request_count = chaos.rng.randint(1, CLIENTS)
                row_counts = [
                    chaos.rng.choice((1, 1, 1, 2, 5, 17, 64)) for _ in range(request_count)
                ]
                requests = [
                    chaos.ask(client, chaos.rng.choices(range(len(chaos.texts)), k=row_count))
                    for row_count in row_counts
                ]
                await asyncio.gather(*requests)
                progress.update(bar, completed=chaos.counts["answers"])
        disturbing.cancel()
        await asyncio.gather(disturbing, return_exceptions=True)


def main() -> int:
    """Run, and print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--answers", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    texts = random_texts(rng)
    flags = ("--workers", str(arguments.workers), "--poll-s", "0.2", "--access-log", "0")
    with tempfile.TemporaryDirectory() as root:
        bundle = Path(root) / "model" / "1"
        shutil.copytree(find_bundle(arguments.bundle), bundle)
        expected = answers_alone(bundle, texts)
        with served(root, *flags) as server:
            chaos = Chaos(url=server.url, texts=texts, expected=expected, rng=rng)
            model, pid = bundle / "model.onnx", server.process.pid
            asyncio.run(storm(chaos, answers=arguments.answers, model=model, pid=pid))

    failures = chaos.counts["wrong answers"]
    table = Table("", "count", title=f"chaos of seed {arguments.seed}", title_justify="left")
    for name, count in sorted(chaos.counts.items()):
        table.add_row(name, f"{count:,}")
        if name.startswith("status"):
            failures += count
    Console().print(table)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
