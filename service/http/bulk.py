"""`application/x-ndjson` in and out: texts of any number through a window of constant size.

A stream reads on only while what it has read and not yet sent fits into its window, so a slow
client slows itself. All streams of a process share a few turns at the engine: a request of one text
never waits behind more than those.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from evalmode.service.errors import InvalidField, NotReady, QueueFull, RequestTimeout
from evalmode.service.ndjson import (
    DIGEST_HEADER,
    MEDIA_TYPE,
    WINDOW_BYTES,
    WINDOW_ROWS,
    Predict,
    Predicted,
    Splitter,
    answer_lines,
    spell,
)
from evalmode.service.strict_json import SHOWN_CHARACTERS
from evalmode.service.telemetry.timings import Timings, timings_of

# What takes a turn at the engine together.
_GROUP_ROWS = 32
_GROUP_BYTES = 256 << 10

_TICK_S = 0.5
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
    """The query of a stream."""

    top_k: int = 3
    truncate: bool = True
    model: str | None = None
    version: str | None = None


def parse_query(items: Iterable[tuple[str, str]], *, max_top_k: int) -> BulkQuery:
    """The query that these parameters make. Raises InvalidField for one that is unknown, given
    twice or wrong.
    """
    parameters: dict[str, str] = {}
    for name, value in items:
        if name not in BulkQuery.__dataclass_fields__ or name in parameters:
            complaint = "is not one of top_k, truncate, model and version"
            if name in parameters:
                complaint = "is given twice"
            raise InvalidField(
                f"query parameter {name[:SHOWN_CHARACTERS]!r} {complaint}",
                field=name[:SHOWN_CHARACTERS],
            )
        parameters[name] = value
    top_k, truncate = parameters.get("top_k", "3"), parameters.get("truncate", "true")
    if not (
        top_k.isascii() and top_k.isdecimal() and len(top_k) < 10 and 1 <= int(top_k) <= max_top_k
    ):
        raise InvalidField(
            f"top_k must be a number from 1 to {max_top_k}, got {top_k[:SHOWN_CHARACTERS]!r}",
            field="top_k",
        )
    if truncate not in ("true", "false"):
        raise InvalidField(
            f"truncate must be true or false, got {truncate[:SHOWN_CHARACTERS]!r}", field="truncate"
        )
    return BulkQuery(
        top_k=int(top_k),
        truncate=truncate == "true",
        model=parameters.get("model"),
        version=parameters.get("version"),
    )


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
        self._engine = engine
        self._draining = draining
        self._drain_s = drain_s
        self._turns = asyncio.Semaphore(parallel + 1)

    async def stopping(self) -> None:
        """Return when a stream that began before should end."""
        while not self._draining():  # noqa: ASYNC110 - the state of the process, which no event tells
            await asyncio.sleep(_TICK_S)
        await asyncio.sleep(self._drain_s)

    def response(self, model: TextModel, query: BulkQuery) -> Response:
        """The response that reads the request's body and answers it line by line, all from this one
        model.
        """
        return _BulkResponse(self, model, query)

    async def answer(self, raw: Sequence[bytes | None], first: int, predict: Predict) -> bytes:
        """The answers of these lines, when it is their turn."""
        async with self._turns:
            return b"".join(
                await answer_lines(raw, first=first, predict=predict, inline_bytes=_INLINE_BYTES)
            )

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


class _BulkResponse(Response):
    """Reads and writes at once, so it owns both ends of the connection; it ends at once when the
    client hangs up.
    """

    def __init__(self, streams: Streams, model: TextModel, query: BulkQuery) -> None:
        # The last header asks proxies not to hold answers back.
        super().__init__(
            media_type=MEDIA_TYPE, headers={DIGEST_HEADER: model.digest, "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._streams = streams
        self._model = model
        self._query = query
        self._window = _Window()
        self._groups: asyncio.Queue[_Group | str | None] = asyncio.Queue()  # bounded by the window
        self._running: set[asyncio.Task[bytes]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. What goes wrong before its first bytes came is raised, and has a
        status of its own.
        """
        self._timings = timings_of(scope)
        first = await _next(receive, self._streams.silence_s)
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        reading = asyncio.create_task(self._read(first, receive))
        writing = asyncio.create_task(self._write(send))
        stopping = asyncio.create_task(self._streams.stopping())
        try:
            await asyncio.wait((reading, writing, stopping), return_when=asyncio.FIRST_COMPLETED)
            if stopping.done() and not (reading.done() or writing.done()):
                reading.cancel()
                self._groups.put_nowait("the server is stopping: what follows was not read")
                await writing
            elif writing.done():
                writing.result()
            else:
                reading.result()
        except (ClientDisconnect, TimeoutError):
            # nobody reads any more; that this response has no end tells the server to close the
            # connection
            pass
        finally:
            left = (reading, writing, stopping, *self._running)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _read(self, message: Message, receive: Receive) -> None:
        """Start group after group; when the body has ended, wait until the client hangs up."""
        splitter = Splitter(max_line_bytes=self._streams.max_line_bytes)
        first = 0
        end: str | None = None
        while True:
            lines = list(splitter.feed(message.get("body", b"")))
            ended = not message.get("more_body", False)
            for group in _grouped(
                [*lines, *splitter.end()] if ended else lines, self._streams.group_rows
            ):
                await self._start(group, first)
                first += len(group)
            if ended:
                break
            try:
                message = await _next(receive, self._streams.silence_s)
            except RequestTimeout as error:
                end = str(error)
                break
        self._groups.put_nowait(end)
        while True:
            await _next(receive, None)

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

    async def _write(self, send: Send) -> None:
        last = b""
        while isinstance(group := await self._groups.get(), _Group):
            try:
                body = await group.answers
            except NotReady as error:
                last = spell({"error": str(error)})
                break
            await self._send(send, body, more=True)
            self._window.leave(group)
        if isinstance(group, str):
            last = spell({"error": group})
        await self._send(send, last, more=False)

    async def _send(self, send: Send, body: bytes, *, more: bool) -> None:
        async with asyncio.timeout(self._streams.silence_s):
            await send({"type": "http.response.body", "body": body, "more_body": more})


async def _next(receive: Receive, silence_s: float | None) -> Message:
    """What comes next of the body. Raises ClientDisconnect, and RequestTimeout after `silence_s`
    without any.
    """
    try:
        async with asyncio.timeout(silence_s):
            message = await receive()
    except TimeoutError as error:
        raise RequestTimeout(f"no more of the body came for {silence_s:g} s") from error
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message


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
