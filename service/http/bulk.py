"""`application/x-ndjson` in and out: texts of any number through a window of constant size.

A stream reads on only while what it has read and not yet sent fits into its window, so a slow
client slows itself. All streams of a process share a few turns at the engine: a request of one text
never waits behind more than those.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from evalmode.service.errors import BadRequest, NotReady, QueueFull, RequestTimeout
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
from evalmode.service.protocol.compression import Encoding, decompressed
from evalmode.service.settings import setting_named
from evalmode.service.telemetry.timings import Timings, timings_of

# What takes a turn at the engine together.
_GROUP_ROWS = 32
_GROUP_BYTES = 256 << 10

_TICK_S = 0.5
_SMALL_BYTES = 64 << 10
_INLINE_BYTES = 2_000  # as for the encoding of texts: more would hold the event loop up


class TextModel(Protocol):
    """What a stream needs of a model."""

    @property
    def digest(self) -> str:
        """The digest of its bundle."""

    async def text_rows_async(
        self, texts: Sequence[str], *, truncate: bool
    ) -> tuple[list[Any], list[bool]]:
        """The jobs of `texts`, and which of them were cut."""

    def predictions(
        self, answers: Sequence[Any], truncated: Sequence[bool], *, top_k: int
    ) -> Sequence[Predicted]:
        """The predictions that the answers of these jobs mean."""


class Answers(Protocol):
    """What a stream needs of the engine."""

    async def answer_async(
        self,
        jobs: Sequence[Any],
        *,
        timeout_s: float | None = None,
        timed: Callable[[float, float], None] | None = None,
    ) -> list[Any]:
        """The answers of `jobs`; QueueFull where there is no room for them."""

    async def wait_for_room(self, rows: int, *, nbytes: int = 0) -> None:
        """Return when so much would be admitted."""


@dataclass(frozen=True, kw_only=True)
class BulkQuery:
    """What holds for all lines of a stream."""

    top_k: int = 3
    truncate: bool = True


class Streams:
    """All streams of a process: their turns at the engine, and their end when the server stops.

    `parallel` batches run at once; one group more than that keeps the engine busy while answers are
    written. A stream that is still there `drain_s` after `draining` began to be true ends: it
    answers what it has read, and says so.
    """

    def __init__(
        self,
        engine: Answers,
        *,
        parallel: int,
        max_line_bytes: int,
        silence_s: float,
        queue_rows: int,
        draining: Callable[[], bool] = lambda: False,
        drain_s: float = 0.0,
    ) -> None:
        self.max_line_bytes = max_line_bytes
        self.silence_s = silence_s
        self.group_rows = min(_GROUP_ROWS, queue_rows)
        self._too_long = (
            f"{line_too_long(max_line_bytes)}, or raise {setting_named('max_body_bytes')}"
        )
        self._engine = engine
        self._draining = draining
        self._drain_s = drain_s
        self._turns = asyncio.Semaphore(parallel + 1)

    async def stopping(self) -> None:
        """Return when a stream that began before should end."""
        while not self._draining():  # noqa: ASYNC110 - the state of the process, which no event tells
            await asyncio.sleep(_TICK_S)
        await asyncio.sleep(self._drain_s)

    def response(
        self, model: TextModel, query: BulkQuery, *, encoding: Encoding | None = None
    ) -> Response:
        """The response that reads the request's body and answers it line by line, all from this one
        model. `encoding` is the one that the body travels in.
        """
        return _BulkResponse(self, model, query, encoding)

    async def answer(self, raw: Sequence[bytes | None], first: int, predict: Predict) -> bytes:
        """The answers of these lines, when it is their turn."""
        async with self._turns:
            answers = await answer_lines(
                raw,
                first=first,
                predict=predict,
                inline_bytes=_INLINE_BYTES,
                too_long=self._too_long,
            )
            return b"".join(answers)

    async def predict(
        self, model: TextModel, query: BulkQuery, texts: Sequence[str], *, timings: Timings
    ) -> Sequence[Predicted]:
        """The predictions of `texts`, however long the engine has no room for them."""
        before = time.monotonic()
        jobs, truncated = await model.text_rows_async(texts, truncate=query.truncate)
        before = timings.encoded(jobs, since=before)
        nbytes = sum(row.nbytes for _, row in jobs)
        while True:
            await self._engine.wait_for_room(len(jobs), nbytes=nbytes)
            try:
                # No deadline: a stream is slowed down where others are refused.
                timings.waited(time.monotonic() - before)
                answers = await self._engine.answer_async(
                    jobs, timeout_s=None, timed=timings.waited
                )
            except QueueFull:
                before = time.monotonic()
                await asyncio.sleep(0)  # another request took the room
                continue
            before = time.monotonic()
            predictions = model.predictions(answers, truncated, top_k=query.top_k)
            timings.written(since=before)
            return predictions


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Lines on their way together, and what they hold of the window."""

    answers: asyncio.Task[bytes]
    rows: int
    nbytes: int


class _Window:
    """What a stream has read and not yet sent; one group always fits."""

    def __init__(self) -> None:
        self._rows = self._nbytes = 0
        self._left = asyncio.Event()

    async def enter(self, *, rows: int, nbytes: int) -> None:
        """Wait until so much fits."""
        while self._rows and (
            self._rows + rows > WINDOW_ROWS or self._nbytes + nbytes > WINDOW_BYTES
        ):
            self._left.clear()
            await self._left.wait()
        self._rows += rows
        self._nbytes += nbytes

    def leave(self, group: _Group) -> None:
        """Make room again: this group was sent."""
        self._rows -= group.rows
        self._nbytes -= group.nbytes
        self._left.set()


class _Inbox:
    """The chunks of a body, fetched one ahead: a pending receive is how a hang-up shows.

    A compressed chunk may hold a million lines, and their client may be gone after the first.
    """

    def __init__(self, receive: Receive, *, silence_s: float) -> None:
        self._receive = receive
        self._silence_s = silence_s
        self._chunks: deque[tuple[bytes, bool]] = deque()
        self._arrived = asyncio.Event()
        self._wanted = asyncio.Event()
        self._hung_up = False
        self.complete = False  # whether the end of the body is here

    async def fill(self) -> None:
        """Fetch chunk after chunk, and return when the client hangs up."""
        while (message := await self._receive())["type"] != "http.disconnect":
            self.complete = not message.get("more_body", False)
            self._chunks.append((message.get("body", b""), not self.complete))
            self._arrived.set()
            self._wanted.clear()
            if not self.complete:  # else only a hang-up can follow
                await self._wanted.wait()
        self._hung_up = True
        self._arrived.set()

    def look(self) -> None:
        """Fetch one chunk more than is wanted, to see whether the client is still there."""
        self._wanted.set()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The chunks up to the end of the body. Raises ClientDisconnect, and RequestTimeout after
        `silence_s` without a chunk.
        """
        more_body = True
        while more_body:
            try:
                async with asyncio.timeout(self._silence_s):
                    while not self._chunks and not self._hung_up:
                        self._arrived.clear()
                        await self._arrived.wait()
            except TimeoutError as error:
                raise RequestTimeout(
                    f"no more of the body came for {self._silence_s:g} s"
                ) from error
            if self._hung_up:
                raise ClientDisconnect
            chunk, more_body = self._chunks.popleft()
            if not self._chunks:
                self._wanted.set()
            yield chunk


class _BulkResponse(Response):
    """Reads and writes at once, so it owns both ends of the connection; it ends at once when the
    client hangs up.
    """

    def __init__(
        self, streams: Streams, model: TextModel, query: BulkQuery, encoding: Encoding | None
    ) -> None:
        # The last header asks proxies not to hold answers back.
        super().__init__(
            media_type=MEDIA_TYPE, headers={DIGEST_HEADER: model.digest, "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._streams = streams
        self._model = model
        self._query = query
        self._encoding = encoding
        self._window = _Window()
        self._groups: asyncio.Queue[_Group | str | None] = asyncio.Queue()  # bounded by the window
        self._running: set[asyncio.Task[bytes]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. What goes wrong before its first bytes came is raised, and has a
        status of its own.
        """
        self._timings = timings_of(scope)
        inbox = _Inbox(receive, silence_s=self._streams.silence_s)
        receiving = asyncio.create_task(inbox.fill())
        try:
            # Generators are closed here: one that is left to the garbage collector may outlive the
            # event loop.
            async with aclosing(inbox.chunks()) as chunks:
                if self._encoding is None:
                    await self._exchange(await anext(chunks, b""), chunks, inbox, receiving, send)
                    return
                async with aclosing(decompressed(chunks, self._encoding)) as pieces:
                    # Compressed data begins with a header that holds nothing. A small body that is
                    # here is read to its end: broken compression is then an error with a status.
                    first = b""
                    while not first or (inbox.complete and len(first) < _SMALL_BYTES):
                        piece = await anext(pieces, None)
                        if piece is None:
                            break
                        first += piece
                    await self._exchange(first, pieces, inbox, receiving, send)
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)

    async def _exchange(
        self,
        first: bytes,
        pieces: AsyncIterator[bytes],
        inbox: _Inbox,
        receiving: asyncio.Task[None],
        send: Send,
    ) -> None:
        """Read and write until all is answered, the client hangs up, or the server stops."""
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        reading = asyncio.create_task(self._read(first, pieces))
        writing = asyncio.create_task(self._write(send, inbox))
        stopping = asyncio.create_task(self._streams.stopping())
        waiting: set[asyncio.Task[None]] = {receiving, reading, writing, stopping}
        try:
            while not (writing.done() or receiving.done()):
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                waiting -= done
                if stopping in done and not reading.done():
                    reading.cancel()
                    waiting.discard(reading)
                    self._groups.put_nowait("the server is stopping: what follows was not read")
        except (ClientDisconnect, TimeoutError):
            # Nobody reads any more. A response without an end tells the server to close the
            # connection.
            pass
        finally:
            unfinished = (reading, writing, stopping, *self._running)
            for unfinished_task in unfinished:
                unfinished_task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    async def _read(self, piece: bytes | None, pieces: AsyncIterator[bytes]) -> None:
        """Start group after group until the body ends."""
        splitter = Splitter(max_line_bytes=self._streams.max_line_bytes)
        first = 0
        end: str | None = None
        ended = False
        while not ended:
            ended = piece is None
            lines = splitter.end() if piece is None else splitter.feed(piece)
            for group in _grouped(lines, self._streams.group_rows):
                await self._start(group, first)
                first += len(group)
            if not ended:
                try:
                    piece = await anext(pieces, None)
                except (RequestTimeout, BadRequest) as error:  # silence, or broken compression
                    end, ended = str(error), True
        self._groups.put_nowait(end)

    async def _start(self, raw: Sequence[bytes | None], first: int) -> None:
        nbytes = sum(map(len, filter(None, raw)))
        await self._window.enter(rows=len(raw), nbytes=nbytes)
        task = asyncio.create_task(self._streams.answer(raw, first, self._predict))
        self._running.add(task)
        task.add_done_callback(self._forget)
        self._groups.put_nowait(_Group(answers=task, rows=len(raw), nbytes=nbytes))

    def _forget(self, task: asyncio.Task[bytes]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            # the first failure is the stream's last line; of the others nobody asks
            task.exception()

    async def _predict(self, texts: Sequence[str]) -> Sequence[Predicted]:
        return await self._streams.predict(self._model, self._query, texts, timings=self._timings)

    async def _write(self, send: Send, inbox: _Inbox) -> None:
        last = b""
        groups = 0
        while isinstance(group := await self._groups.get(), _Group):
            try:
                body = await group.answers
            except NotReady as error:
                last = encode_line({"error": str(error)})
                break
            await self._send(send, body, more=True)
            self._window.leave(group)
            groups += 1
            # A server sees a hang-up when it writes, and tells the next receive. Each look may hold
            # one more chunk, so they double: 20 of them in a million groups.
            if groups.bit_count() == 1:
                inbox.look()
        if isinstance(group, str):
            last = encode_line({"error": group})
        await self._send(send, last, more=False)

    async def _send(self, send: Send, body: bytes, *, more: bool) -> None:
        async with asyncio.timeout(self._streams.silence_s):
            await send({"type": "http.response.body", "body": body, "more_body": more})


def _grouped(lines: Iterable[bytes | None], most_rows: int) -> Iterator[list[bytes | None]]:
    """Lines that are not blank, in groups that are not too large."""
    group: list[bytes | None] = []
    nbytes = 0
    for line in lines:
        if line is not None and not line.strip():
            continue
        group.append(line)
        nbytes += len(line or b"")
        if len(group) == most_rows or nbytes >= _GROUP_BYTES:
            yield group
            group, nbytes = [], 0
    if group:
        yield group
