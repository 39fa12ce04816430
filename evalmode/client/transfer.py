"""A file of texts into a file of answers, chunk by chunk and in order, with constant memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from evalmode.client.answers_file import AnswersFile, Stdout
from evalmode.errors import EvalmodeError
from evalmode.service.ndjson import WINDOW_BYTES, WINDOW_ROWS, Splitter, encode_line, line_too_long
from evalmode.terminal import open_console

# A request fills no more than the server's window: its answers are read when all of it is sent.
CHUNK_LINES, CHUNK_BYTES = WINDOW_ROWS, WINDOW_BYTES

STDIN = Path("-")
_MAX_LINE_BYTES = 16 << 20
_READ_BYTES = 256 << 10
_BOM = b"\xef\xbb\xbf"


class Answerer(Protocol):
    """Answers lines, from any number of tasks at once: a remote server, or a model here."""

    async def answer(self, lines: Sequence[bytes], *, first: int) -> tuple[list[bytes], str]:
        """The answers of `lines`, numbered from `first`, and the digest of the model that gave
        them.
        """


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Lines that are asked together; a line too long to be asked is a chunk of its own, without
    `lines`.
    """

    lines: Sequence[bytes]
    first: int
    read_bytes: int

    @property
    def count(self) -> int:
        """The answers that it wants."""
        return len(self.lines) or 1


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where texts are read from: JSONL, or with the suffix .txt a text a line; `-` is JSONL from
    stdin.
    """

    path: Path
    chunk_lines: int = CHUNK_LINES

    @property
    def repeatable(self) -> bool:
        """Whether it can be read again from its beginning."""
        return self.path != STDIN and stat.S_ISREG(self.path.stat().st_mode)

    def check(self) -> None:
        """Raise EvalmodeError where it cannot be read."""
        try:
            # whoever opens a named pipe and goes away has broken it
            if self.repeatable or self.path.is_dir():
                self.open().close()
        except OSError as error:
            raise EvalmodeError(f"--input {self.path} cannot be read: {error.strerror}") from error

    def open(self) -> IO[bytes]:
        """The open input. Raises EvalmodeError where it cannot be read."""
        try:
            # Unbuffered: a thread that waits for stdin must hold no lock that the end of the
            # process needs.
            return open(
                0 if self.path == STDIN else self.path,
                "rb",
                buffering=0,
                closefd=self.path != STDIN,
            )
        except OSError as error:
            raise EvalmodeError(f"--input {self.path} cannot be read: {error.strerror}") from error

    def chunks(self, file: IO[bytes], *, skip: int) -> Iterator[Chunk]:
        """The lines after the first `skip`, in chunks; what has come is not kept waiting for
        more.
        """
        first = read_bytes = 0
        for lines, read_bytes in self._blocks(file):
            while first < skip and lines:
                passed = min(skip - first, len(lines))
                del lines[:passed]
                first += passed
            for group in _grouped(lines, self.chunk_lines):
                yield Chunk(
                    lines=[line for line in group if line is not None],
                    first=first,
                    read_bytes=read_bytes,
                )
                first += len(group)

    def _blocks(self, file: IO[bytes]) -> Iterator[tuple[list[bytes | None], int]]:
        splitter, read_bytes, ended = Splitter(max_line_bytes=_MAX_LINE_BYTES), 0, False
        while not ended:
            block = file.read(_READ_BYTES)
            ended = not block
            raw = (
                splitter.end()
                if ended
                else splitter.feed(block.removeprefix(_BOM) if read_bytes == 0 else block)
            )
            read_bytes += len(block)
            if self.path.suffix == ".txt":
                yield [None if line is None else _as_json(line) for line in raw], read_bytes
            else:
                yield [line for line in raw if line is None or line.strip()], read_bytes


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One job: every line of `source` answered into `writer`, `concurrency` chunks at once."""

    source: Source
    answerer: Answerer
    writer: AnswersFile | Stdout
    concurrency: int

    async def run(self) -> None:
        """Answer what is not answered yet. Raises EvalmodeError, which says how to go on."""
        # A task for each chunk, in order: what is asked at once, and as much again that waits to be
        # written.
        pending: asyncio.Queue[tuple[Chunk, asyncio.Task[tuple[list[bytes], str | None]]] | None]
        pending = asyncio.Queue(self.concurrency)
        started: set[asyncio.Task[Any]] = set()
        writing = asyncio.create_task(self._write(pending))
        reading = asyncio.create_task(self._read(pending, started))
        try:
            done, _ = await asyncio.wait((writing, reading), return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            left = (writing, reading, *started)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _read(self, pending: asyncio.Queue[Any], started: set[asyncio.Task[Any]]) -> None:
        turns = asyncio.Semaphore(self.concurrency)
        with self.source.open() as file:
            chunks = self.source.chunks(file, skip=self.writer.lines)
            async for chunk in (
                _straight(chunks) if self.source.repeatable else _from_thread(chunks)
            ):
                await turns.acquire()
                task = asyncio.create_task(self._answer(chunk, turns))
                started.add(task)
                task.add_done_callback(started.discard)
                task.add_done_callback(_look_at)
                await pending.put((chunk, task))
        await pending.put(None)

    async def _answer(
        self, chunk: Chunk, turns: asyncio.Semaphore
    ) -> tuple[list[bytes], str | None]:
        try:
            if chunk.lines:
                return await self.answerer.answer(chunk.lines, first=chunk.first)
            problem = line_too_long(_MAX_LINE_BYTES)
            return [encode_line({"index": chunk.first, "error": problem})], None
        finally:
            turns.release()

    async def _write(self, pending: asyncio.Queue[Any]) -> None:
        with _progress(self.source) as report:
            began, lines_before = time.monotonic(), self.writer.lines
            while (following := await pending.get()) is not None:
                chunk, task = following
                try:
                    answers, digest = await task
                except EvalmodeError as error:
                    raise EvalmodeError(f"{error}; {self.writer.way_on}") from error
                self.writer.write(answers, digest=digest)
                report(
                    chunk.read_bytes,
                    (self.writer.lines - lines_before) / max(1e-9, time.monotonic() - began),
                )


def _look_at(task: asyncio.Task[Any]) -> None:
    """Where several chunks fail the first is told; asyncio would print a traceback of each that
    nobody looked at.
    """
    if not task.cancelled():
        task.exception()


async def _straight(chunks: Iterator[Chunk]) -> AsyncIterator[Chunk]:
    for chunk in chunks:
        yield chunk


async def _from_thread(chunks: Iterator[Chunk]) -> AsyncIterator[Chunk]:
    """The chunks of an input that may not have any yet: it is waited for in a thread that nobody
    waits for.
    """
    loop = asyncio.get_running_loop()
    read: asyncio.Queue[Chunk | BaseException | None] = asyncio.Queue(1)

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it all interest
            try:
                for chunk in chunks:
                    asyncio.run_coroutine_threadsafe(read.put(chunk), loop).result()
                last: BaseException | None = None
            except OSError as error:
                last = error
            asyncio.run_coroutine_threadsafe(read.put(last), loop).result()

    threading.Thread(target=run, daemon=True, name="stdin").start()
    while isinstance(item := await read.get(), Chunk):
        yield item
    if item is not None:
        raise item


def _grouped(lines: Sequence[bytes | None], most_lines: int) -> Iterator[list[bytes | None]]:
    group: list[bytes | None] = []
    nbytes = 0
    for line in lines:
        size = 0 if line is None else len(line) + 1
        if group and (
            line is None
            or group[-1] is None
            or len(group) == most_lines
            or nbytes + size > CHUNK_BYTES
        ):
            yield group
            group, nbytes = [], 0
        group.append(line)
        nbytes += size
    if group:
        yield group


def _as_json(line: bytes) -> bytes:
    return json.dumps(line.decode("utf-8", "replace")).encode()


@contextlib.contextmanager
def _progress(source: Source) -> Iterator[Any]:
    """What is told, after each chunk, the bytes read and the rows a second; a bar where stderr is a
    terminal.
    """
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    console = open_console(stderr=True)
    columns = (
        TextColumn("predict"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]} rows/s"),
    )
    total = os.path.getsize(source.path) if source.repeatable else None
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("predict", total=total, speed="-")
        yield lambda read_bytes, speed: bar.update(
            task, completed=read_bytes, speed=f"{speed:,.0f}"
        )
