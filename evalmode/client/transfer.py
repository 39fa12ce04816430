"""A file of texts into a file of answers: chunk by chunk, in order, in constant memory.

1. `Source.chunks` reads the input and cuts it into chunks of lines.
2. `Transfer` has up to `concurrency` chunks answered at once, by a server or by a bundle here.
3. `Transfer` writes the answers in the order of the lines, and shows a progress bar.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, TypeAlias

from evalmode.client.answers_file import AnswersFile, Stdout
from evalmode.errors import EvalmodeError
from evalmode.service.ndjson import WINDOW_BYTES, WINDOW_ROWS, Splitter, encode_line, line_too_long
from evalmode.terminal import open_console

# A client that sends a whole request before it reads the response could wait for a server that
# waits for it. So a request is never larger than the window of what a server reads ahead.
CHUNK_LINES, CHUNK_BYTES = WINDOW_ROWS, WINDOW_BYTES

STDIN = Path("-")
_MAX_LINE_BYTES = 16 << 20
_READ_BYTES = 256 << 10
_BOM = b"\xef\xbb\xbf"


class Answerer(Protocol):
    """Answers lines, from any number of tasks at once: `RemoteServer` or `LocalModel`."""

    async def answer(self, lines: Sequence[bytes], *, first: int) -> tuple[list[bytes], str]:
        """The answers to `lines`, numbered from `first`, and the digest of the model."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Lines that are sent together; `first` is the index of the first of them in the file.

    A line that is too long to send is a chunk by itself, with no `lines`. `read_bytes` is how much
    of the input was read until here.
    """

    lines: Sequence[bytes]
    first: int
    read_bytes: int


# A task that returns the answers of a chunk, and the digest of the model that gave them.
_AnswerTask: TypeAlias = asyncio.Task[tuple[list[bytes], str | None]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The input: JSONL, or with the suffix .txt one text per line. The path `-` is JSONL on stdin.

    Blank lines of JSONL are skipped, and do not count; a blank line of a .txt file is a text.
    """

    path: Path
    chunk_lines: int = CHUNK_LINES

    @property
    def repeatable(self) -> bool:
        """Whether it can be read a second time: a regular file can, a pipe cannot."""
        return self.path != STDIN and stat.S_ISREG(self.path.stat().st_mode)

    def require_readable(self) -> None:
        """Raise EvalmodeError where the input cannot be opened."""
        try:
            # A named pipe is not opened for a test: closing it again would break it for its writer.
            if self.repeatable or self.path.is_dir():
                self.open().close()
        except OSError as error:
            raise EvalmodeError(f"--input {self.path} cannot be read: {error.strerror}") from error

    def open(self) -> IO[bytes]:
        """The open input. Raises EvalmodeError where it cannot be opened."""
        is_stdin = self.path == STDIN
        try:
            # Unbuffered: a thread that waits for stdin would hold the buffer's lock, which the
            # interpreter takes at exit.
            return open(0 if is_stdin else self.path, "rb", buffering=0, closefd=not is_stdin)
        except OSError as error:
            raise EvalmodeError(f"--input {self.path} cannot be read: {error.strerror}") from error

    def chunks(self, file: IO[bytes], *, skip: int) -> Iterator[Chunk]:
        """The lines after the first `skip`, in chunks.

        A chunk never waits for more input than there is: a pipe's last line is sent at once.
        """
        splitter = Splitter(max_line_bytes=_MAX_LINE_BYTES)
        first = read_bytes = 0
        ended = False
        while not ended:
            block = file.read(_READ_BYTES)
            ended = not block
            if ended:
                raw_lines = splitter.end()
            elif read_bytes == 0:
                raw_lines = splitter.feed(block.removeprefix(_BOM))
            else:
                raw_lines = splitter.feed(block)
            read_bytes += len(block)

            # None stands for a line that is too long.
            lines: list[bytes | None] = []
            for line in raw_lines:
                if line is None:
                    lines.append(None)
                elif self.path.suffix == ".txt":
                    lines.append(json.dumps(line.decode("utf-8", "replace")).encode())
                elif line.strip():
                    lines.append(line)

            skipped = min(max(0, skip - first), len(lines))
            first += skipped
            for group in _groups_of(lines[skipped:], max_lines=self.chunk_lines):
                sent = [line for line in group if line is not None]
                yield Chunk(lines=sent, first=first, read_bytes=read_bytes)
                first += len(group)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One job: answer every line of `source` into `writer`, `concurrency` chunks at once."""

    source: Source
    answerer: Answerer
    writer: AnswersFile | Stdout
    concurrency: int

    async def run(self) -> None:
        """Answer the lines that `writer` does not hold yet.

        One task reads the input and starts a task for each chunk; another writes the answers in the
        order of the chunks. Raises EvalmodeError for the first chunk in the file that fails; its
        message says how to continue.
        """
        free = asyncio.Semaphore(self.concurrency)
        answering: set[_AnswerTask] = set()
        # In the order of the file: chunks at work, and as many again that wait to be written. None
        # follows the last.
        pending: asyncio.Queue[tuple[Chunk, _AnswerTask] | None] = asyncio.Queue(self.concurrency)

        async def answer(chunk: Chunk) -> tuple[list[bytes], str | None]:
            try:
                if chunk.lines:
                    return await self.answerer.answer(chunk.lines, first=chunk.first)
                problem = line_too_long(_MAX_LINE_BYTES)
                return [encode_line({"index": chunk.first, "error": problem})], None
            finally:
                free.release()

        def end(task: _AnswerTask) -> None:
            answering.discard(task)
            # When several chunks fail, only the first is awaited. asyncio prints a traceback of
            # each other failure whose exception was never retrieved.
            if not task.cancelled():
                task.exception()

        async def read() -> None:
            with self.source.open() as file:
                chunks = self.source.chunks(file, skip=self.writer.lines)
                async for chunk in _without_blocking(chunks, repeatable=self.source.repeatable):
                    await free.acquire()
                    task = asyncio.create_task(answer(chunk))
                    answering.add(task)
                    task.add_done_callback(end)
                    await pending.put((chunk, task))
            await pending.put(None)

        async def write() -> None:
            with _progress_bar(self.source) as update:
                began, earlier_lines = time.monotonic(), self.writer.lines
                while (following := await pending.get()) is not None:
                    chunk, task = following
                    try:
                        answers, digest = await task
                    except EvalmodeError as error:
                        raise EvalmodeError(f"{error}; {self.writer.how_to_continue}") from error
                    self.writer.write(answers, digest=digest)
                    seconds = max(1e-9, time.monotonic() - began)
                    update(chunk.read_bytes, (self.writer.lines - earlier_lines) / seconds)

        writing, reading = asyncio.create_task(write()), asyncio.create_task(read())
        try:
            done, _ = await asyncio.wait((writing, reading), return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            # After a failure, or Ctrl-C.
            unfinished = (writing, reading, *answering)
            for unfinished_task in unfinished:
                unfinished_task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)


async def _without_blocking(chunks: Iterator[Chunk], *, repeatable: bool) -> AsyncIterator[Chunk]:
    """The chunks, without blocking the event loop while a pipe has nothing to read."""
    if repeatable:
        # Reading a regular file takes less time than handing it over from a thread.
        for chunk in chunks:
            yield chunk
        return

    # A daemon thread: when the transfer ends early, nothing waits for the pipe's next line.
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Chunk | OSError | None] = asyncio.Queue(1)

    def read() -> None:
        # RuntimeError: the loop was closed, so nothing needs the chunks any more.
        with contextlib.suppress(RuntimeError):
            end: OSError | None = None
            try:
                for chunk in chunks:
                    asyncio.run_coroutine_threadsafe(queue.put(chunk), loop).result()
            except OSError as error:
                end = error
            asyncio.run_coroutine_threadsafe(queue.put(end), loop).result()

    threading.Thread(target=read, daemon=True, name="stdin").start()
    while isinstance(item := await queue.get(), Chunk):
        yield item
    if item is not None:
        raise item


def _groups_of(lines: Sequence[bytes | None], *, max_lines: int) -> Iterator[list[bytes | None]]:
    """The lines in groups of at most `max_lines` and CHUNK_BYTES; a None is a group by itself."""
    group: list[bytes | None] = []
    group_bytes = 0
    for line in lines:
        line_bytes = 0 if line is None else len(line) + 1
        is_full = len(group) == max_lines or group_bytes + line_bytes > CHUNK_BYTES
        if group and (is_full or line is None or group[-1] is None):
            yield group
            group, group_bytes = [], 0
        group.append(line)
        group_bytes += line_bytes
    if group:
        yield group


@contextlib.contextmanager
def _progress_bar(source: Source) -> Iterator[Callable[[int, float], None]]:
    """A function to call after each chunk with the bytes read and the rows per second.

    It draws a bar where stderr is a terminal, and nothing elsewhere.
    """
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    console = open_console(stderr=True)
    total_bytes = os.path.getsize(source.path) if source.repeatable else None
    with Progress(
        TextColumn("predict"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]} rows/s"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("predict", total=total_bytes, speed="-")

        def update(read_bytes: int, rows_per_s: float) -> None:
            bar.update(task, completed=read_bytes, speed=f"{rows_per_s:,.0f}")

        yield update
