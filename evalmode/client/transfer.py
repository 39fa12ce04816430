"""Answers a file of texts, chunk by chunk, in the order of its lines and in constant memory.

1. `Source.chunks` reads the input and cuts it into chunks of lines.
2. `Transfer` sends up to `concurrency` chunks at once to a backend: a server, or a bundle in this
   process.
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
from evalmode.service.ndjson import (
    WINDOW_BYTES,
    WINDOW_ROWS,
    Line,
    Splitter,
    encode_line,
    line_too_long,
    read_line,
)
from evalmode.terminal import open_console

# A request is never larger than the window of what a server reads ahead. Otherwise a client that
# sends all of its request first, and a server that waits for its answers to be read, could wait for
# each other.
CHUNK_LINES, CHUNK_BYTES = WINDOW_ROWS, WINDOW_BYTES

STDIN = Path("-")
# A longer line is not sent, and its answer is an error.
_MAX_LINE_BYTES = 16 << 20
# How much is read at once. A pipe may give less.
_READ_BYTES = 256 << 10
_BOM = b"\xef\xbb\xbf"


class Backend(Protocol):
    """Answers lines, from any number of tasks at once: `RemoteServer` or `LocalModel`."""

    async def answer(self, lines: Sequence[bytes], *, first: int) -> tuple[list[bytes], str]:
        """The answers to `lines`, numbered from `first`, and the digest of the model."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Lines that are sent together.

    lines         the lines; empty for a chunk that stands for one line that is too long to send
    first         the index of the first line in the input
    read_bytes    how many bytes of the input have been read so far
    """

    lines: Sequence[bytes]
    first: int
    read_bytes: int


# A task that returns the answers of a chunk, and the digest of the model that gave them.
_AnswerTask: TypeAlias = asyncio.Task[tuple[list[bytes], str | None]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The input: JSONL, or one text per line if the suffix is .txt. The path `-` is JSONL on stdin.

    Blank lines of JSONL are skipped and have no index. A blank line of a .txt file is a text.
    `flag` is the flag that errors name.
    """

    path: Path
    chunk_lines: int = CHUNK_LINES
    flag: str = "--input"

    @property
    def repeatable(self) -> bool:
        """Whether it can be read a second time: a regular file can, a pipe cannot."""
        return self.path != STDIN and stat.S_ISREG(self.path.stat().st_mode)

    def require_readable(self) -> None:
        """Raise EvalmodeError where the input cannot be opened."""
        try:
            # A named pipe is not opened for a test: to close it would break it for its writer.
            if self.repeatable or self.path.is_dir():
                self.open().close()
        except OSError as error:
            raise EvalmodeError(
                f"{self.flag} {self.path} cannot be read: {error.strerror}"
            ) from error

    def open(self) -> IO[bytes]:
        """The open input. Raises EvalmodeError where it cannot be opened."""
        is_stdin = self.path == STDIN
        try:
            # Unbuffered: a thread that waits for stdin would hold the buffer's lock, which the
            # interpreter takes at exit.
            return open(0 if is_stdin else self.path, "rb", buffering=0, closefd=not is_stdin)
        except OSError as error:
            raise EvalmodeError(
                f"{self.flag} {self.path} cannot be read: {error.strerror}"
            ) from error

    def chunks(self, file: IO[bytes], *, skip: int) -> Iterator[Chunk]:
        """The lines after the first `skip`, in chunks.

        A chunk has only lines of one read and does not wait for the next. So a line from a pipe is
        sent at once.
        """
        splitter = Splitter(max_line_bytes=_MAX_LINE_BYTES)
        first = read_bytes = 0
        is_end = False
        while not is_end:
            block = file.read(_READ_BYTES)
            is_end = not block
            if is_end:
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

            # The answers to the first `skip` lines are in the output already.
            skip_count = min(max(0, skip - first), len(lines))
            first += skip_count
            for group in _groups_of(lines[skip_count:], max_lines=self.chunk_lines):
                sendable_lines = [line for line in group if line is not None]
                yield Chunk(lines=sendable_lines, first=first, read_bytes=read_bytes)
                first += len(group)

    def texts(self, *, most: int) -> list[str]:
        """The first `most` texts.

        Raises EvalmodeError for an input without texts, and for a line that is no text.
        """
        texts: list[str] = []
        with self.open() as file:
            for chunk in self.chunks(file, skip=0):
                lines = [read_line(raw) for raw in chunk.lines]
                if not lines:
                    lines = [Line(problem=line_too_long(_MAX_LINE_BYTES))]
                for line in lines:
                    if len(texts) == most:
                        return texts
                    if line.problem is not None:
                        raise EvalmodeError(
                            f"{self.flag} {self.path}: text {len(texts) + 1} cannot be read:"
                            f" {line.problem}"
                        )
                    texts.append(line.text)
        if not texts:
            raise EvalmodeError(f"{self.flag} {self.path} has no texts")
        return texts


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Answers each line of `source` into `writer`, up to `concurrency` chunks at once."""

    source: Source
    backend: Backend
    writer: AnswersFile | Stdout
    concurrency: int

    async def run(self) -> None:
        """Answer the lines that `writer` does not hold yet.

        One task reads the input and starts a task for each chunk. Another task writes the answers
        in the order of the chunks. Raises EvalmodeError for the first chunk of the file that fails;
        its message says how to continue.
        """
        # A chunk needs a slot for the time in which it is answered.
        slots = asyncio.Semaphore(self.concurrency)
        answer_tasks: set[_AnswerTask] = set()
        # The chunks in the order of the file, until they are written; None follows the last one.
        # The queue is bounded, so that all others do not pile up in memory behind a slow chunk.
        pending: asyncio.Queue[tuple[Chunk, _AnswerTask] | None] = asyncio.Queue(self.concurrency)

        async def answer(chunk: Chunk) -> tuple[list[bytes], str | None]:
            try:
                if chunk.lines:
                    return await self.backend.answer(chunk.lines, first=chunk.first)
                problem = line_too_long(_MAX_LINE_BYTES)
                return [encode_line({"index": chunk.first, "error": problem})], None
            finally:
                slots.release()

        def discard(task: _AnswerTask) -> None:
            answer_tasks.discard(task)
            # When several chunks fail, only the first is awaited. asyncio prints a traceback of
            # each other failure, unless its exception is retrieved.
            if not task.cancelled():
                task.exception()

        async def read() -> None:
            with self.source.open() as file:
                chunks = self.source.chunks(file, skip=self.writer.lines)
                async for chunk in _without_blocking(chunks, repeatable=self.source.repeatable):
                    await slots.acquire()
                    task = asyncio.create_task(answer(chunk))
                    answer_tasks.add(task)
                    task.add_done_callback(discard)
                    await pending.put((chunk, task))
            await pending.put(None)

        async def write() -> None:
            with _progress_bar(self.source) as update:
                started, earlier_lines = time.monotonic(), self.writer.lines
                while (entry := await pending.get()) is not None:
                    chunk, task = entry
                    try:
                        answers, digest = await task
                    except EvalmodeError as error:
                        raise EvalmodeError(f"{error}; {self.writer.how_to_continue}") from error
                    self.writer.write(answers, digest=digest)
                    seconds = max(1e-9, time.monotonic() - started)
                    update(chunk.read_bytes, (self.writer.lines - earlier_lines) / seconds)

        writing, reading = asyncio.create_task(write()), asyncio.create_task(read())
        try:
            done, _ = await asyncio.wait((writing, reading), return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            # After a failure, or Ctrl-C, some tasks are still running.
            tasks = (writing, reading, *answer_tasks)
            for running_task in tasks:
                running_task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _without_blocking(chunks: Iterator[Chunk], *, repeatable: bool) -> AsyncIterator[Chunk]:
    """The chunks, without blocking the event loop while a pipe has nothing to read."""
    if repeatable:
        # To read a regular file takes less time than to pass its chunks between threads.
        for chunk in chunks:
            yield chunk
        return

    # A daemon thread, so that a transfer that ends early does not wait for the pipe's next line.
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Chunk | OSError | None] = asyncio.Queue(1)

    def read() -> None:
        # The loop raises RuntimeError when it is closed: then nothing reads the queue any more.
        with contextlib.suppress(RuntimeError):
            failure: OSError | None = None
            try:
                for chunk in chunks:
                    asyncio.run_coroutine_threadsafe(queue.put(chunk), loop).result()
            except OSError as error:
                failure = error
            asyncio.run_coroutine_threadsafe(queue.put(failure), loop).result()

    threading.Thread(target=read, daemon=True, name="stdin").start()
    while isinstance(item := await queue.get(), Chunk):
        yield item
    if item is not None:
        raise item


def _groups_of(lines: Sequence[bytes | None], *, max_lines: int) -> Iterator[list[bytes | None]]:
    """The lines in groups of at most `max_lines` and CHUNK_BYTES.

    A line that is None, or larger than CHUNK_BYTES, is a group by itself.
    """
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
    """A function to call after each chunk, with the bytes read so far and the rows per second.

    It draws a bar on stderr if that is a terminal.
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
