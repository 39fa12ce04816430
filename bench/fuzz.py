"""Sends bad requests to a real server, over its socket.

    python bench/fuzz.py BUNDLE

The requests of `fuzz_requests.py` are sent on many connections that are kept alive, with good ones
between them. The exit code is 1 for any of these failures:

- a status that is not intended, or an answer that does not conform to its headers;
- a connection that ends without an answer;
- other bits than before in the answer to a good request;
- memory that grows, or a server that ends.

The bytes of failed requests are written to files.
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
from fuzz_requests import Model, Request, good_requests, make_bombs, request_of
from launched import Server, served
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

CONNECTIONS = 32
# The share of good requests among all.
GOOD_SHARE = 0.04
# How long the server waits for bytes that never arrive.
SERVER_TIMEOUT_S = 2
ANSWER_S = 60
MAX_GROWTH_MB = 40
MAX_FAILURE_FILES = 20
INTENDED_STATUSES = frozenset({200, 400, 404, 405, 408, 413, 415, 422, 431, 503, 504})
FLAGS = (
    "--access-log",
    "0",
    "--no-model-control",
    "--header-timeout-s",
    str(SERVER_TIMEOUT_S),
    "--body-timeout-s",
    str(SERVER_TIMEOUT_S),
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A complete answer. `body` is still compressed if the server compressed it."""

    status: int
    headers: dict[str, str]
    body: bytes

    def problem(self) -> str | None:
        """What is wrong with the form of the answer. None if nothing is."""
        try:
            plain = self.body
            if encoding := self.headers.get("content-encoding"):
                # 31 means gzip, and 15 means zlib, which HTTP calls deflate.
                plain = zlib.decompress(plain, wbits=31 if encoding == "gzip" else 15)
            media_type = self.headers["content-type"]
            if media_type == "application/x-ndjson" and self.status == 200:
                value = [json.loads(line) for line in plain.splitlines()]
            elif media_type == "application/octet-stream":
                value = json.loads(plain[: int(self.headers["inference-header-content-length"])])
            else:
                value = json.loads(plain)
        except (KeyError, ValueError, zlib.error) as error:
            return f"an answer of status {self.status} that cannot be read: {error!r}"
        has_error = isinstance(value, dict) and isinstance(value.get("error"), str)
        if self.status != 200 and not has_error:
            return f"an answer of status {self.status} without an error"
        return None


class Connection:
    """A client that keeps its connection alive, and opens another one after its end."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.opened = 0
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, raw: bytes) -> Answer:
        """The first answer to these bytes. Raises OSError or EOFError if there is none."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
            self.opened += 1
        assert self._reader is not None
        # Not drained: the answer may arrive before everything is sent.
        self._writer.write(raw)
        async with asyncio.timeout(ANSWER_S):
            answer = await self._read_answer(self._reader)
        if answer.headers.get("connection") == "close":
            await self.close()
        return answer

    async def leave(self, raw: bytes) -> None:
        """Send these bytes on a new connection, and close it at once."""
        await self.close()
        _, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writer.write(raw)
        await self.close()

    async def close(self) -> None:
        """Close the connection. The next request opens another one."""
        if self._writer is not None:
            self._writer.close()
            # OSError: the server has closed it already.
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
        self._writer = None

    async def _read_answer(self, reader: asyncio.StreamReader) -> Answer:
        # An interim answer (100 Continue) precedes the real one.
        status = 100
        while status == 100:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            status = int(head[0].split()[1])
        headers = {}
        for line in head[1:-2]:
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
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
    """One run: the requests, the counts and the failures."""

    server: Server
    seed: int
    bodies: int
    models: list[Model]
    good: list[Request]
    answers: dict[str, bytes] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    times_s: list[tuple[float, str]] = field(default_factory=list)
    failures: list[tuple[str, bytes]] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    sent: int = 0

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2])

    async def run(self) -> None:
        """Send every request, with good ones before, between and after the others."""
        bombs = make_bombs()
        await self._send_good_requests()
        with Progress(transient=True) as progress:
            bar = progress.add_task("bodies", total=self.bodies)
            shares = [
                self.bodies // CONNECTIONS + (number < self.bodies % CONNECTIONS)
                for number in range(CONNECTIONS)
            ]
            async with asyncio.TaskGroup() as group:
                for number, share in enumerate(shares):
                    rng = random.Random(f"{self.seed}-{number}")
                    group.create_task(self._run_client(share, rng, bombs, progress, bar))
        await self._send_good_requests()
        self.memory_mb.append(self.server.resident_mb())

    async def _send_good_requests(self) -> None:
        connection = Connection(self.port)
        for request in self.good:
            await self._ask(connection, request, random.Random(0))
        await connection.close()

    async def _run_client(
        self,
        bodies: int,
        rng: random.Random,
        bombs: list[tuple[str, bytes]],
        progress: Progress,
        bar: TaskID,
    ) -> None:
        connection = Connection(self.port)
        for _ in range(bodies):
            if rng.random() < GOOD_SHARE:
                await self._ask(connection, rng.choice(self.good), rng)
            await self._ask(connection, request_of(self.models, rng, bombs), rng)
            self.sent += 1
            progress.update(bar, completed=self.sent)
            # Five times in a run.
            if self.sent * 5 % self.bodies < 5:
                self.memory_mb.append(self.server.resident_mb())
        await connection.close()
        self.counts["connections"] += connection.opened

    async def _ask(self, connection: Connection, request: Request, rng: random.Random) -> None:
        raw = request.encode(rng)
        if request.framing == "hang up":
            self.counts["hung up by us"] += 1
            await connection.leave(raw[: rng.randrange(len(raw))])
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
        time_s = time.perf_counter() - started
        self.counts[f"status {answer.status}"] += 1
        if answer.status != 408 and not request.is_incomplete:
            self.times_s.append((time_s, f"{answer.status} {request.path}, {request.framing}"))
        if request.framing not in ("length", "chunked"):
            # Further answers would be to the rest of the body.
            await connection.close()
        self._judge(request, answer, raw)

    def _judge(self, request: Request, answer: Answer, raw: bytes) -> None:
        if answer.status not in INTENDED_STATUSES:
            self._fail(f"status {answer.status}: {answer.body[:200]!r}", raw)
        elif problem := answer.problem():
            self._fail(problem, raw)
        elif request.answer_key is not None:
            self.counts["known good answers"] += answer.status == 200
            if answer.status not in (200, 503):
                self._fail(f"status {answer.status} to a known good request", raw)
            elif answer.status == 200:
                expected = self.answers.setdefault(request.answer_key, answer.body)
                if answer.body != expected:
                    self._fail("other bits for a known good request", raw)

    def _fail(self, reason: str, raw: bytes) -> None:
        self.counts["failures"] += 1
        if len(self.failures) < MAX_FAILURE_FILES:
            self.failures.append((reason, raw))


def models_of(server: Server) -> list[Model]:
    """The models of a server, by its own metadata."""
    with httpx.Client(base_url=server.url) as client:
        index = client.post("/v2/repository/index", json={"ready": True}).json()
        metadata = [client.get(f"/v2/models/{entry['name']}").json() for entry in index]
    return [Model(name=model["name"], inputs=model["inputs"]) for model in metadata]


def show(fuzz: Fuzz) -> bool:
    """Print the figures, and write failed requests to files. Returns whether all is well."""
    times_s = sorted(fuzz.times_s)
    # The first fifth fills caches and pools.
    growth_mb = fuzz.memory_mb[-1] - fuzz.memory_mb[1]
    if growth_mb > MAX_GROWTH_MB:
        fuzz.failures.append(
            (f"memory grew by {growth_mb:.0f} MB, {MAX_GROWTH_MB} MB are allowed", b"")
        )
    if fuzz.server.process.poll() is not None:
        fuzz.failures.append((f"the server ended with {fuzz.server.process.returncode}", b""))
    table = Table(
        "", "count", title=f"{fuzz.sent:,} bodies of seed {fuzz.seed}", title_justify="left"
    )
    for name, count in sorted(fuzz.counts.items()):
        table.add_row(name, f"{count:,}")
    table.add_row("median answer", f"{1000 * times_s[len(times_s) // 2][0]:.1f} ms")
    table.add_row("99% of answers", f"{1000 * times_s[len(times_s) * 99 // 100][0]:.1f} ms")
    table.add_row("slowest answer", f"{1000 * times_s[-1][0]:.0f} ms: {times_s[-1][1]}")
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
    """Run, and print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--bodies", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    arguments = parser.parse_args()
    with served(arguments.bundle, *FLAGS) as server:
        models = models_of(server)
        good = [request for model in models for request in good_requests(model)]
        fuzz = Fuzz(
            server=server, seed=arguments.seed, bodies=arguments.bodies, models=models, good=good
        )
        fuzz.memory_mb.append(server.resident_mb())
        asyncio.run(fuzz.run())
        return 0 if show(fuzz) else 1


if __name__ == "__main__":
    sys.exit(main())
