"""Streams of lines, `application/x-ndjson` in and out, of any length in constant memory.

Lines are read in groups. A task answers each group, and the answers are written in the order of
the lines:

    body -> _Inbox -> (decompress) -> lines -> groups -> Streams.answer -> body of the response

There are two limits. What a stream has read and not yet written must fit into its window, so a
slow client slows itself down. All streams of a process share a few slots at the engine, so a
request of one text waits behind few groups.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from evalmode import DEFAULT_TOP_K
from evalmode.service.batching.engine import Engine
from evalmode.service.errors import BadRequest, NotReady, QueueFull, RequestTimeout
from evalmode.service.http.body import silence_error
from evalmode.service.models.model import Model
from evalmode.service.ndjson import (
    DIGEST_HEADER,
    MEDIA_TYPE,
    WINDOW_BYTES,
    WINDOW_ROWS,
    Predict,
    Predicted,
    Splitter,
    answer_lines,
    encode_line,
    line_too_long,
)
from evalmode.service.protocol.compression import Encoding, decompress
from evalmode.service.settings import setting_named
from evalmode.service.telemetry.timings import Timings

# The most that one group holds. With half of the rows other requests are answered faster, but
# streams lose a fifth of their throughput (docs/decisions.md).
_GROUP_ROWS = 32
_GROUP_BYTES = 256 << 10

# How often a stream looks whether the server is draining.
_DRAINING_POLL_S = 0.5

# A compressed body that has arrived whole is decompressed up to here before the response begins.
_SMALL_BYTES = 64 << 10

# Lines of more bytes are parsed in a thread, where they do not block the event loop; it is the
# limit for the encoding of texts, too (`INLINE_CHARACTERS`).
_INLINE_BYTES = 2_000


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """The options of all lines of a stream."""

    top_k: int = DEFAULT_TOP_K
    truncate: bool = True


class Streams:
    """All streams of a process: their slots at the engine, and their end when the server stops."""

    def __init__(
        self,
        engine: Engine,
        *,
        parallel: int,
        max_line_bytes: int,
        silence_s: float,
        queue_rows: int,
        draining: Callable[[], bool] = lambda: False,
        drain_s: float = 0.0,
    ) -> None:
        """Share `engine`, which runs `parallel` batches at once.

        `silence_s` is how long a client may neither send nor read. A stream that is unfinished
        `drain_s` after `draining()` became true ends: it answers what it has read, and says so.
        """
        self.max_line_bytes = max_line_bytes
        self.silence_s = silence_s
        # A group that is larger than the queue would never be admitted.
        self.group_rows = min(_GROUP_ROWS, queue_rows)
        self._too_long = (
            f"{line_too_long(max_line_bytes)}, or raise {setting_named('max_body_bytes')}"
        )
        self._engine = engine
        self._draining = draining
        self._drain_s = drain_s
        # One group more than batches run keeps the engine busy while answers are written.
        self._slots = asyncio.Semaphore(parallel + 1)

    def response(
        self,
        model: Model,
        options: StreamOptions,
        *,
        timings: Timings,
        encoding: Encoding | None = None,
    ) -> Response:
        """The response that reads the body of its request and answers each line with `model`.

        `encoding` is the content encoding of the request; None for a plain body.
        """
        predict = partial(self._predict, model, options, timings)
        return _StreamResponse(self, predict, digest=model.digest, encoding=encoding)

    async def stopping(self) -> None:
        """Return when a stream that is unfinished should end."""
        while not self._draining():  # noqa: ASYNC110 - a state of the process, without an event
            await asyncio.sleep(_DRAINING_POLL_S)
        await asyncio.sleep(self._drain_s)

    async def answer(self, lines: Sequence[bytes | None], first: int, predict: Predict) -> bytes:
        """The answers of a group of lines, once it has a slot; the first line has index `first`."""
        async with self._slots:
            answers = await answer_lines(
                lines,
                first=first,
                predict=predict,
                inline_bytes=_INLINE_BYTES,
                too_long=self._too_long,
            )
            return b"".join(answers)

    async def _predict(
        self, model: Model, options: StreamOptions, timings: Timings, texts: Sequence[str]
    ) -> Sequence[Predicted]:
        """The predictions of `texts`, however long it takes until the engine has room for them."""
        started = time.monotonic()
        jobs, truncated = await model.text_rows_async(texts, truncate=options.truncate)
        waiting_started = timings.encoded(jobs, since=started)
        nbytes = sum(row.nbytes for _, row in jobs)
        while True:
            await self._engine.wait_for_room(len(jobs), nbytes=nbytes)
            timings.waited(time.monotonic() - waiting_started)
            try:
                # Without a deadline: a stream is slowed down where other requests are refused.
                answers = await self._engine.answer_async(
                    jobs, timeout_s=None, timed=timings.waited
                )
                break
            except QueueFull:
                # Another request was faster. Let it run, and wait again.
                waiting_started = time.monotonic()
                await asyncio.sleep(0)
        writing_started = time.monotonic()
        predictions = model.predictions(answers, truncated, top_k=options.top_k)
        timings.written(since=writing_started)
        return predictions


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Lines that are answered together, and what they take of the window."""

    answers: asyncio.Task[bytes]
    rows: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class _End:
    """The end of the groups; an `error` becomes the last line of the response."""

    error: str | None = None


class _Window:
    """The rows and bytes that a stream has read and not yet written."""

    def __init__(self) -> None:
        self._rows = 0
        self._nbytes = 0
        self._released = asyncio.Event()

    async def reserve(self, *, rows: int, nbytes: int) -> None:
        """Wait until so much fits; one group fits into an empty window, however large it is."""
        while self._rows and (
            self._rows + rows > WINDOW_ROWS or self._nbytes + nbytes > WINDOW_BYTES
        ):
            self._released.clear()
            await self._released.wait()
        self._rows += rows
        self._nbytes += nbytes

    def release(self, group: _Group) -> None:
        """Give back what this group took: it was written."""
        self._rows -= group.rows
        self._nbytes -= group.nbytes
        self._released.set()


class _Inbox:
    """The chunks of a body, fetched one ahead of their reader.

    Only a pending `receive` notices that the client has disconnected. A reader may be busy with one
    chunk for long: compressed, it can hold a million lines.
    """

    def __init__(self, receive: Receive, *, silence_s: float) -> None:
        self.is_complete = False  # whether the end of the body has arrived
        self._receive = receive
        self._silence_s = silence_s
        # Each chunk with ASGI's `more_body`: whether another one follows.
        self._chunks: deque[tuple[bytes, bool]] = deque()
        self._arrived = asyncio.Event()
        self._may_fetch = asyncio.Event()
        self._disconnected = False

    async def fetch_all(self) -> None:
        """Fetch one chunk after the other, and return when the client disconnects."""
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                break
            self.is_complete = not message.get("more_body", False)
            self._chunks.append((message.get("body", b""), not self.is_complete))
            self._arrived.set()
            self._may_fetch.clear()
            # After the end of the body the next message can only be the disconnect.
            if not self.is_complete:
                await self._may_fetch.wait()
        self._disconnected = True
        self._arrived.set()

    def fetch_ahead(self) -> None:
        """Fetch one chunk more than the reader needs, to notice a client that disconnected."""
        self._may_fetch.set()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The chunks up to the end of the body.

        Raises ClientDisconnect, and RequestTimeout after `silence_s` without a chunk.
        """
        more_body = True
        while more_body:
            try:
                async with asyncio.timeout(self._silence_s):
                    while not self._chunks and not self._disconnected:
                        self._arrived.clear()
                        await self._arrived.wait()
            except TimeoutError as error:
                raise silence_error(self._silence_s) from error
            if self._disconnected:
                raise ClientDisconnect
            chunk, more_body = self._chunks.popleft()
            if not self._chunks:
                self._may_fetch.set()
            yield chunk


class _StreamResponse(Response):
    """Reads the request and writes the response at the same time, until one of them ends."""

    def __init__(
        self, streams: Streams, predict: Predict, *, digest: str, encoding: Encoding | None
    ) -> None:
        super().__init__(
            media_type=MEDIA_TYPE,
            headers={
                DIGEST_HEADER: digest,
                # Asks nginx not to buffer the response: answers should arrive line by line.
                "x-accel-buffering": "no",
            },
        )
        # Starlette sets the length of an empty body; that of a stream is unknown.
        del self.headers["content-length"]
        self._streams = streams
        self._predict = predict
        self._encoding = encoding
        self._window = _Window()
        # The groups in the order of their lines, and then the end. The window bounds their number.
        self._groups: asyncio.Queue[_Group | _End] = asyncio.Queue()
        self._line_count = 0  # of the lines that are in groups
        self._running: set[asyncio.Task[bytes]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request.

        An error before the first bytes of the body is raised, and becomes a response with another
        status. A later one is the last line of this response.
        """
        inbox = _Inbox(receive, silence_s=self._streams.silence_s)
        receiving = asyncio.create_task(inbox.fetch_all())
        try:
            # `aclosing`, because a generator that is left to the garbage collector may outlive the
            # event loop.
            async with aclosing(inbox.chunks()) as chunks:
                if self._encoding is None:
                    first = await anext(chunks, b"")
                    await self._exchange(first, chunks, inbox=inbox, receiving=receiving, send=send)
                    return
                async with aclosing(decompress(chunks, self._encoding)) as pieces:
                    # A header comes first, and decompresses to nothing. A small body that has
                    # arrived is read to its end: it can still be refused with a status.
                    first = b""
                    while not first or (inbox.is_complete and len(first) < _SMALL_BYTES):
                        piece = await anext(pieces, None)
                        if piece is None:
                            break
                        first += piece
                    await self._exchange(first, pieces, inbox=inbox, receiving=receiving, send=send)
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)

    async def _exchange(
        self,
        first: bytes,
        pieces: AsyncIterator[bytes],
        *,
        inbox: _Inbox,
        receiving: asyncio.Task[None],
        send: Send,
    ) -> None:
        """Read and write until all is answered, the client disconnects, or the server stops."""
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        reading = asyncio.create_task(self._read(first, pieces))
        writing = asyncio.create_task(self._write(send, inbox))
        stopping = asyncio.create_task(self._streams.stopping())
        waiting: set[asyncio.Task[None]] = {receiving, reading, writing, stopping}
        try:
            # `receiving` ends when the client disconnects, `writing` when all is answered.
            while not (writing.done() or receiving.done()):
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                # Raise what a task has raised.
                for task in done:
                    task.result()
                waiting -= done
                # The lines that were read are still answered, so only the reading ends.
                if stopping in done and not reading.done():
                    reading.cancel()
                    waiting.discard(reading)
                    self._groups.put_nowait(
                        _End(error="the server is stopping: the lines from here on were not read")
                    )
        except (ClientDisconnect, TimeoutError):
            # The client does not read any more. The response has no end, so the server closes the
            # connection.
            pass
        finally:
            unfinished = (reading, writing, stopping, *self._running)
            for unfinished_task in unfinished:
                unfinished_task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    async def _read(self, first: bytes, pieces: AsyncIterator[bytes]) -> None:
        """Start group after group until the body ends."""
        splitter = Splitter(max_line_bytes=self._streams.max_line_bytes)
        piece: bytes | None = first
        while piece is not None:
            await self._start_groups(splitter.feed(piece))
            try:
                piece = await anext(pieces, None)
            except (RequestTimeout, BadRequest) as error:
                # Silence, or broken compression. An unfinished line is not answered.
                self._groups.put_nowait(_End(error=str(error)))
                return
        await self._start_groups(splitter.end())
        self._groups.put_nowait(_End())

    async def _start_groups(self, lines: Iterable[bytes | None]) -> None:
        for group in _grouped(lines, self._streams.group_rows):
            nbytes = sum(len(line) for line in group if line is not None)
            await self._window.reserve(rows=len(group), nbytes=nbytes)
            task = asyncio.create_task(self._streams.answer(group, self._line_count, self._predict))
            self._running.add(task)
            task.add_done_callback(self._forget)
            self._groups.put_nowait(_Group(answers=task, rows=len(group), nbytes=nbytes))
            self._line_count += len(group)

    def _forget(self, task: asyncio.Task[bytes]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            # The first failure becomes the last line. asyncio would log each later one as an
            # exception that was never retrieved.
            task.exception()

    async def _write(self, send: Send, inbox: _Inbox) -> None:
        """Write the answers of group after group, and then the last line."""
        last_line = b""
        group_count = 0
        while True:
            group = await self._groups.get()
            if isinstance(group, _End):
                if group.error is not None:
                    last_line = encode_line({"error": group.error})
                break
            try:
                answers = await group.answers
            except NotReady as error:
                last_line = encode_line({"error": str(error)})
                break
            await self._send(send, answers, more=True)
            self._window.release(group)
            group_count += 1
            # A server notices a disconnect when it writes, and the next `receive` returns it. Each
            # may also return one more chunk to hold, so they become rarer: after 1, 2, 4, 8 groups
            # and so on, 20 of them for a million groups.
            if group_count.bit_count() == 1:
                inbox.fetch_ahead()
        await self._send(send, last_line, more=False)

    async def _send(self, send: Send, body: bytes, *, more: bool) -> None:
        async with asyncio.timeout(self._streams.silence_s):
            await send({"type": "http.response.body", "body": body, "more_body": more})


def _grouped(lines: Iterable[bytes | None], max_rows: int) -> Iterator[list[bytes | None]]:
    """The lines that are not blank in groups; None is a line that was too long to be read."""
    group: list[bytes | None] = []
    nbytes = 0
    for line in lines:
        if line is None:
            group.append(None)
        elif line.strip():
            group.append(line)
            nbytes += len(line)
        else:
            continue
        if len(group) == max_rows or nbytes >= _GROUP_BYTES:
            yield group
            group, nbytes = [], 0
    if group:
        yield group
