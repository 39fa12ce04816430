"""Mistaken and malicious requests against a real server, over its socket: `python bench/fuzz.py
BUNDLE`.

The requests of `fuzz_requests.py` on many connections that are kept alive, and known good ones
between them. Exit code 1 for a status that nobody intended, a connection lost without an answer, an
answer that is not what it says to be or has other bits than before, memory that grows, or a server
that is gone. Talks HTTP only; what failed is kept, byte by byte.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from fuzz_requests import Model, Request, bombs, known_good, request_of
from launched import Server, served
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

CONNECTIONS = 32
KNOWN_SHARE = 0.04
LATE_S = 2  # how long the server waits for what never comes
ANSWER_S = 60
MAX_GROWTH_MB = 40
KEPT = 20  # failures
INTENDED = frozenset({200, 400, 404, 405, 408, 413, 415, 422, 431, 503, 504})
FLAGS = (
    "--access-log",
    "0",
    "--no-model-control",
    "--header-timeout-s",
    str(LATE_S),
    "--body-timeout-s",
    str(LATE_S),
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer, whole; `body` is as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    def complaint(self) -> str | None:
        """What is wrong with its form, if something is."""
        try:
            encoding = self.headers.get("content-encoding")
            plain = (
                self.body
                if encoding is None
                else zlib.decompress(self.body, wbits=31 if encoding == "gzip" else 15)
            )
            media = self.headers["content-type"]
            if media == "application/x-ndjson" and self.status == 200:
                found = [json.loads(line) for line in plain.splitlines()]
            elif media == "application/octet-stream":
                found = json.loads(plain[: int(self.headers["inference-header-content-length"])])
            else:
                found = json.loads(plain)
        except (KeyError, ValueError, zlib.error) as error:
            return f"an answer of status {self.status} that cannot be read: {error!r}"
        if self.status != 200 and not (
            isinstance(found, dict) and isinstance(found.get("error"), str)
        ):
            return f"an answer of status {self.status} without an error"
        return None


class Connection:
    """A connection that is kept alive as long as both sides like."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.opened = 0
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, raw: bytes) -> Answer:
        """The first answer to these bytes. Raises OSError or EOFError where none comes."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
            self.opened += 1
        assert self._reader is not None
        self._writer.write(raw)  # and the answer may come before all of it is sent
        async with asyncio.timeout(ANSWER_S):
            answer = await self._answer(self._reader)
        if answer.headers.get("connection") == "close":
            await self.close()
        return answer

    async def leave(self, raw: bytes) -> None:
        """Send these bytes, and be gone."""
        await self.close()
        _, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writer.write(raw)
        await self.close()

    async def close(self) -> None:
        """End it; the next question is asked on a new one."""
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):  # the other side was quicker
                await self._writer.wait_closed()
        self._writer = None

    async def _answer(self, reader: asyncio.StreamReader) -> Answer:
        status = 100
        while status == 100:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            status = int(head[0].split()[1])
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])
        }
        if headers.get("transfer-encoding") != "chunked":
            return Answer(
                status=status,
                headers=headers,
                body=await reader.readexactly(int(headers["content-length"])),
            )
        body = bytearray()
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
        return Answer(status=status, headers=headers, body=bytes(body))


@dataclass(kw_only=True)
class Fuzz:
    """One run: what is asked, and what was counted."""

    server: Server
    seed: int
    bodies: int
    models: list[Model]
    known: list[Request]
    bits: dict[str, bytes] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    took_s: list[tuple[float, str]] = field(default_factory=list)
    failures: list[tuple[str, bytes]] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    asked: int = 0

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2])

    async def run(self) -> None:
        """Ask everything, known good requests before, between and after the others."""
        explosive = bombs()
        await self._ask_all_known()
        with Progress(transient=True) as progress:
            bar = progress.add_task("bodies", total=self.bodies)
            shares = [
                self.bodies // CONNECTIONS + (number < self.bodies % CONNECTIONS)
                for number in range(CONNECTIONS)
            ]
            async with asyncio.TaskGroup() as group:
                for number, share in enumerate(shares):
                    chance = random.Random(f"{self.seed}-{number}")
                    group.create_task(self._client(share, chance, explosive, progress, bar))
        await self._ask_all_known()
        self.memory_mb.append(self.server.resident_mb())

    async def _ask_all_known(self) -> None:
        connection = Connection(self.port)
        for request in self.known:
            await self._ask(connection, request, random.Random(0))
        await connection.close()

    async def _client(
        self,
        bodies: int,
        chance: random.Random,
        explosive: list[tuple[str, bytes]],
        progress: Progress,
        bar: TaskID,
    ) -> None:
        connection = Connection(self.port)
        for _ in range(bodies):
            if chance.random() < KNOWN_SHARE:
                await self._ask(connection, chance.choice(self.known), chance)
            await self._ask(connection, request_of(self.models, chance, explosive), chance)
            self.asked += 1
            progress.update(bar, completed=self.asked)
            if self.asked * 5 % self.bodies < 5:
                self.memory_mb.append(self.server.resident_mb())
        await connection.close()
        self.counts["connections"] += connection.opened

    async def _ask(self, connection: Connection, request: Request, chance: random.Random) -> None:
        raw = request.sent(chance)
        if request.framing == "hang up":
            self.counts["hung up by us"] += 1
            await connection.leave(raw[: chance.randrange(len(raw))])
            return
        started = time.perf_counter()
        try:
            answer = await connection.ask(raw)
        except (
            OSError,
            EOFError,
            TimeoutError,
            asyncio.LimitOverrunError,
            ValueError,
            KeyError,
        ) as error:
            self._fail(f"no answer: {error!r}", raw)
            await connection.close()
            return
        took_s = time.perf_counter() - started
        self.counts[f"status {answer.status}"] += 1
        if answer.status != 408 and not request.late:
            self.took_s.append((took_s, f"{answer.status} {request.path}, {request.framing}"))
        if request.framing not in ("length", "chunked"):
            await connection.close()  # what else it says is an answer to the rest of the body
        self._judge(request, answer, raw)

    def _judge(self, request: Request, answer: Answer, raw: bytes) -> None:
        if answer.status not in INTENDED:
            self._fail(f"status {answer.status}: {answer.body[:200]!r}", raw)
        elif complaint := answer.complaint():
            self._fail(complaint, raw)
        elif request.known is not None:
            self.counts["known good answers"] += answer.status == 200
            if answer.status not in (200, 503):
                self._fail(f"status {answer.status} to a known good request", raw)
            elif (
                answer.status == 200
                and self.bits.setdefault(request.known, answer.body) != answer.body
            ):
                self._fail("other bits for a known good request", raw)

    def _fail(self, reason: str, raw: bytes) -> None:
        self.counts["failures"] += 1
        if len(self.failures) < KEPT:
            self.failures.append((reason, raw))


def models_of(server: Server) -> list[Model]:
    """What is served, as it says itself."""
    with httpx.Client(base_url=server.url) as client:
        index = client.post("/v2/repository/index", json={"ready": True}).json()
        found = [client.get(f"/v2/models/{entry['name']}").json() for entry in index]
    return [Model(name=model["name"], inputs=model["inputs"]) for model in found]


def show(fuzz: Fuzz) -> bool:
    """Print the figures; whether all is well."""
    took_s = sorted(fuzz.took_s)
    growth_mb = fuzz.memory_mb[-1] - fuzz.memory_mb[1]
    if growth_mb > MAX_GROWTH_MB:
        fuzz.failures.append(
            (f"memory grew by {growth_mb:.0f} MB, {MAX_GROWTH_MB} MB are allowed", b"")
        )
    if fuzz.server.process.poll() is not None:
        fuzz.failures.append((f"the server ended with {fuzz.server.process.returncode}", b""))
    table = Table(
        "", "count", title=f"{fuzz.asked:,} bodies of seed {fuzz.seed}", title_justify="left"
    )
    for name, count in sorted(fuzz.counts.items()):
        table.add_row(name, f"{count:,}")
    table.add_row("median answer", f"{1000 * took_s[len(took_s) // 2][0]:.1f} ms")
    table.add_row("99% of answers", f"{1000 * took_s[len(took_s) * 99 // 100][0]:.1f} ms")
    table.add_row("slowest answer", f"{1000 * took_s[-1][0]:.0f} ms: {took_s[-1][1]}")
    table.add_row(
        "memory at first, at each fifth, at last",
        " ".join(f"{mb:.0f}" for mb in fuzz.memory_mb) + " MB",
    )
    table.add_row("memory, growth after the first fifth", f"{growth_mb:.1f} MB")
    table.add_row("memory at its highest", f"{fuzz.server.resident_mb('VmHWM'):.0f} MB")
    console = Console()
    console.print(table)
    if fuzz.failures:
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        for number, (reason, raw) in enumerate(fuzz.failures):
            (folder / str(number)).write_bytes(raw)
            console.print(f"{folder / str(number)}: {reason}", markup=False)
    return not fuzz.failures


def main() -> int:
    """Run, and show what was counted."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("bundle", type=Path)
    options.add_argument("--bodies", type=int, default=50_000)
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    asked = options.parse_args()
    with served(asked.bundle, *FLAGS) as server:
        models = models_of(server)
        known = [request for model in models for request in known_good(model)]
        fuzz = Fuzz(server=server, seed=asked.seed, bodies=asked.bodies, models=models, known=known)
        fuzz.memory_mb.append(server.resident_mb())
        asyncio.run(fuzz.run())
        return 0 if show(fuzz) else 1


if __name__ == "__main__":
    sys.exit(main())
