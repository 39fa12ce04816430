"""Streams of lines with fakes of the engine, the model and the connection.

`test_streams_over_http.py` has the tests with a real server.
"""

from __future__ import annotations

import asyncio
import json
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from evalmode.service.errors import (
    BadRequest,
    NotReady,
    QueueFull,
    RequestTimeout,
    RunFailed,
    TextTooLong,
)
from evalmode.service.http.streams import StreamOptions, Streams
from evalmode.service.ndjson import WINDOW_ROWS
from evalmode.service.protocol.compression import Encoding, compress
from evalmode.service.telemetry.timings import Timings

WAIT_S = 30
BUCKET = SimpleNamespace(label="8", positions=8)
DEFAULT_OPTIONS = StreamOptions()


@dataclass
class Model:
    """Predicts each text as its own label; "bad" fails when it is encoded, "nan" when it runs."""

    digest: str = "d" * 64

    async def text_rows_async(
        self, texts: Sequence[str], *, truncate: bool
    ) -> tuple[list[Any], list[bool]]:
        for index, text in enumerate(texts):
            if not truncate and text == "bad":
                raise TextTooLong(index, longest=8)
        jobs = [(BUCKET, SimpleNamespace(text=text, nbytes=8)) for text in texts]
        return jobs, [False] * len(texts)

    def predictions(
        self, answers: Sequence[Any], truncated: Sequence[bool], *, top_k: int
    ) -> list[Any]:
        return [
            SimpleNamespace(top=[SimpleNamespace(label=text, score=0.5)] * top_k, truncated=cut)
            for text, cut in zip(answers, truncated, strict=True)
        ]


@dataclass
class Engine:
    """Answers at once, or when `gate` opens; `peak_rows` is the most rows that ran at once."""

    gate: asyncio.Event | None = None
    full: int = 0
    stopped_after: int = 1 << 30
    running_rows: int = 0
    peak_rows: int = 0
    answered: int = 0
    cancelled: int = 0
    waited_for: list[int] = field(default_factory=list)

    async def wait_for_room(self, rows: int, *, nbytes: int = 0) -> None:
        self.waited_for.append(rows)

    async def answer_async(
        self,
        jobs: Sequence[Any],
        *,
        timeout_s: float | None = None,
        timed: Callable[[float, float], None],
    ) -> list[Any]:
        if self.full:
            self.full -= 1
            raise QueueFull("full", retry_after_s=1)
        if self.answered >= self.stopped_after:
            raise NotReady("the server is stopping and takes no more requests")
        self.running_rows += len(jobs)
        self.peak_rows = max(self.peak_rows, self.running_rows)
        try:
            if self.gate is not None:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += len(jobs)
            raise
        finally:
            self.running_rows -= len(jobs)
        if any(row.text == "nan" for _, row in jobs):
            raise RunFailed("the model answered with numbers that are not finite")
        self.answered += len(jobs)
        return [row.text for _, row in jobs]


class Connection:
    """Both ends of a connection: the client sends `chunks`, and reads while `reads` is set."""

    def __init__(self, chunks: Iterator[bytes], *, then: str = "end", reads: bool = True) -> None:
        self._chunks = chunks
        self._then = then
        self._ended = False
        self.disconnected = asyncio.Event()
        self.reads = asyncio.Event()
        if reads:
            self.reads.set()
        self.status: int | None = None
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.finished = False
        self.received = 0

    async def receive(self) -> Message:
        if not self._ended:
            await asyncio.sleep(0)
            if (chunk := next(self._chunks, None)) is not None:
                self.received += 1
                return {"type": "http.request", "body": chunk, "more_body": True}
            self._ended = True
            if self._then == "end":
                return {"type": "http.request", "body": b"", "more_body": False}
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await self.reads.wait()
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.body += message["body"]
            self.finished = not message["more_body"]

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.body.splitlines()]


def streams(engine: Engine, **changes: Any) -> Streams:
    arguments = {
        "parallel": 2,
        "max_line_bytes": 1000,
        "silence_s": WAIT_S,
        "queue_rows": 4096,
        **changes,
    }
    return Streams(engine, **arguments)


async def exchange(
    connection: Connection,
    engine: Engine,
    options: StreamOptions = DEFAULT_OPTIONS,
    *,
    encoding: Encoding | None = None,
    **changes: Any,
) -> None:
    response = streams(engine, **changes).response(
        Model(), options, timings=Timings(), encoding=encoding
    )
    async with asyncio.timeout(WAIT_S):
        await response({"type": "http"}, connection.receive, connection.send)


async def until(holds: Callable[[], bool]) -> None:
    """Let other tasks run until `holds()` is true."""
    async with asyncio.timeout(WAIT_S):
        while not holds():
            await asyncio.sleep(0)


def test_every_line_is_answered_in_order_with_its_id_or_with_its_problem() -> None:
    body = (
        b'"a"\n\n{"text": "b", "id": 7}\r\n   \n{\n{"id": "x", "text": 3}\n"nan"\n'
        + b"y" * 1001
        + b'\n"last"'
    )
    connection = Connection(iter([body[:9], body[9:20], body[20:]]))
    asyncio.run(exchange(connection, Engine(), StreamOptions(top_k=2)))
    top = [{"label": "a", "score": 0.5}] * 2
    assert connection.status == 200
    assert connection.headers[b"x-evalmode-digest"] == b"d" * 64
    assert connection.headers[b"content-type"] == b"application/x-ndjson"
    assert connection.lines[0] == {
        "index": 0,
        "label": "a",
        "score": 0.5,
        "truncated": False,
        "top": top,
    }
    assert [line["index"] for line in connection.lines] == list(range(7))
    assert [line.get("label") for line in connection.lines] == [
        "a",
        "b",
        None,
        None,
        None,
        None,
        "last",
    ]
    assert [line.get("id") for line in connection.lines] == [None, 7, None, "x", None, None, None]
    assert ["error" in line for line in connection.lines] == [
        False,
        False,
        True,
        True,
        True,
        True,
        False,
    ]
    assert connection.finished


def test_a_text_that_fails_does_not_affect_the_others_of_its_group() -> None:
    texts = ["a", "bad", "b", "nan", "c"] * 20
    connection = Connection(iter([json.dumps(text).encode() + b"\n" for text in texts]))
    asyncio.run(exchange(connection, Engine(), StreamOptions(truncate=False)))
    assert [line.get("label", line.get("error", "")[:9]) for line in connection.lines] == [
        {"bad": "text is l", "nan": "the model"}.get(text, text) for text in texts
    ]


def test_an_empty_body_is_an_empty_answer() -> None:
    connection = Connection(iter([]))
    asyncio.run(exchange(connection, Engine()))
    assert (connection.status, connection.body, connection.finished) == (200, b"", True)


def test_a_stream_waits_for_a_full_engine_and_loses_no_line() -> None:
    engine = Engine(full=5)
    connection = Connection(iter([b'"a"\n' * 100]))
    asyncio.run(exchange(connection, engine))
    assert [line["index"] for line in connection.lines] == list(range(100))
    assert len(engine.waited_for) > 5


def test_groups_are_never_larger_than_the_queue() -> None:
    engine = Engine()
    asyncio.run(exchange(Connection(iter([b'"a"\n' * 100])), engine, queue_rows=3))
    assert max(engine.waited_for) == 3


def test_a_stream_reads_no_more_than_a_window_while_its_client_does_not_read() -> None:
    async def test() -> None:
        engine = Engine()
        connection = Connection((b'"a"\n' * 10 for _ in range(1000)), reads=False)
        answering = asyncio.create_task(exchange(connection, engine))
        await asyncio.sleep(0)
        connection.reads.set()
        await until(lambda: connection.status is not None)
        connection.reads.clear()
        read_before = len(connection.lines)
        await until(lambda: engine.answered - read_before >= WINDOW_ROWS - 20)
        for _ in range(1000):
            await asyncio.sleep(0)
        # 20 more for the lines that the client has just read, or is reading
        assert engine.answered - read_before <= WINDOW_ROWS + 20
        assert connection.received < 40
        connection.reads.set()
        await answering
        assert [line["index"] for line in connection.lines] == list(range(10_000))

    asyncio.run(test())


def test_all_streams_together_run_few_rows_at_once() -> None:
    async def test() -> None:
        engine = Engine(gate=asyncio.Event())
        shared = streams(engine)
        connections = [Connection(iter([b'"a"\n' * 500])) for _ in range(10)]
        tasks = [
            asyncio.create_task(
                shared.response(Model(), StreamOptions(), timings=Timings())(
                    {"type": "http"}, connection.receive, connection.send
                )
            )
            for connection in connections
        ]
        await until(lambda: engine.running_rows >= 96)
        for _ in range(100):
            await asyncio.sleep(0)
        assert engine.peak_rows == 96  # 32 for each batch that runs at once, and 32 more
        engine.gate.set()  # type: ignore[union-attr]
        await asyncio.gather(*tasks)
        assert [len(connection.lines) for connection in connections] == [500] * 10

    asyncio.run(test())


@pytest.mark.parametrize("then", ["end", "more"])
def test_the_rows_of_a_client_that_disconnects_are_cancelled(then: str) -> None:
    async def test() -> None:
        engine = Engine(gate=asyncio.Event())
        connection = Connection(iter([b'"a"\n' * 64]), then=then)
        answering = asyncio.create_task(exchange(connection, engine))
        await until(lambda: engine.running_rows == 64)
        connection.disconnected.set()
        await answering
        assert (engine.running_rows, engine.cancelled, engine.answered) == (0, 64, 0)
        assert not connection.finished
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(test())


def test_a_client_that_disconnects_before_its_first_byte_gets_no_response() -> None:
    async def test() -> None:
        connection = Connection(iter([]), then="more")
        connection.disconnected.set()
        with pytest.raises(ClientDisconnect):
            await exchange(connection, Engine())
        assert connection.status is None

    asyncio.run(test())


def test_silence_before_the_body_is_an_error_and_silence_within_it_a_last_line() -> None:
    silent = Connection(iter([]), then="more")
    with pytest.raises(RequestTimeout):
        asyncio.run(exchange(silent, Engine(), silence_s=0.01))
    assert silent.status is None
    pausing = Connection(iter([b'"a"\n"b"\n"c']), then="more")
    asyncio.run(exchange(pausing, Engine(), silence_s=0.01))
    assert [line.get("label") for line in pausing.lines] == ["a", "b", None]
    assert pausing.lines[-1] == {"error": "no more of the body arrived for 0.01 s"}
    assert pausing.finished


def test_a_client_that_does_not_read_for_too_long_is_disconnected() -> None:
    async def test() -> None:
        connection = Connection(iter([b'"a"\n']), then="more")
        sent = connection.send

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                connection.reads.clear()
            await sent(message)

        response = streams(Engine(), silence_s=0.01).response(
            Model(), StreamOptions(), timings=Timings()
        )
        async with asyncio.timeout(WAIT_S):
            await response({"type": "http"}, connection.receive, send)
        assert not connection.finished

    asyncio.run(test())


def test_a_server_that_stops_answers_what_it_has_read_and_a_last_line_says_why() -> None:
    async def test() -> None:
        draining = False
        connection = Connection(iter([b'"a"\n"b"\n']), then="more")
        answering = asyncio.create_task(exchange(connection, Engine(), draining=lambda: draining))
        await until(lambda: len(connection.lines) == 2)
        draining = True
        await answering
        assert connection.lines[2:] == [
            {"error": "the server is stopping: the lines from here on were not read"}
        ]
        assert connection.finished

    asyncio.run(test())


def test_an_engine_that_closes_ends_the_stream_with_a_last_line() -> None:
    connection = Connection(iter([b'"a"\n' * 100]))
    asyncio.run(exchange(connection, Engine(stopped_after=64)))
    *answers, last = connection.lines
    assert [line["index"] for line in answers] == list(range(len(answers)))
    assert set(last) == {"error"}
    assert "stopping" in last["error"]


def pieces_of(body: bytes, size: int) -> Iterator[bytes]:
    return (body[start : start + size] for start in range(0, len(body), size))


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_compressed_lines_are_answered_whatever_the_size_of_chunks(
    encoding: Encoding, size: int
) -> None:
    body = compress(b"".join(b'"%d"\n' % number for number in range(500)), encoding)
    connection = Connection(pieces_of(body, size))
    asyncio.run(exchange(connection, Engine(), encoding=encoding))
    assert [line["label"] for line in connection.lines] == [str(number) for number in range(500)]
    assert connection.finished


def test_compressed_lines_are_answered_before_the_body_ends() -> None:
    async def test() -> None:
        compressor = zlib.compressobj(wbits=31)
        first = compressor.compress(b'"a"\n') + compressor.flush(zlib.Z_SYNC_FLUSH)
        connection = Connection(iter([first]), then="more")
        answering = asyncio.create_task(exchange(connection, Engine(), encoding="gzip"))
        await until(lambda: len(connection.lines) == 1)
        connection.disconnected.set()
        await answering

    asyncio.run(test())


def test_a_small_body_of_a_million_lines_is_read_a_window_at_a_time() -> None:
    async def test() -> None:
        engine = Engine()
        body = compress(b'"a"\n' * 1_000_000, "gzip")
        assert len(body) < 10_000
        connection = Connection(iter([body]))
        tracemalloc.start()
        answering = asyncio.create_task(exchange(connection, engine, encoding="gzip"))
        await until(lambda: connection.status is not None)
        connection.reads.clear()
        await until(lambda: engine.answered - len(connection.lines) >= WINDOW_ROWS - 32)
        for _ in range(1000):
            await asyncio.sleep(0)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert engine.answered - len(connection.lines) <= WINDOW_ROWS + 32
        assert peak_bytes < 8 << 20
        connection.disconnected.set()
        connection.reads.set()
        await answering

    asyncio.run(test())


@pytest.mark.parametrize(
    ("cut", "sentence"),
    [
        (lambda body: body[:-4], "the body ends within its gzip data"),
        (lambda body: body + b"more", "the body goes on after the end of its gzip data"),
        (lambda body: body[:-8] + b"\0" * 8, "the body is not gzip data"),
    ],
)
def test_broken_compression_ends_a_stream_with_a_last_line(
    cut: Callable[[bytes], bytes], sentence: str
) -> None:
    body = cut(compress(b'"a"\n"b"\n', "gzip"))
    connection = Connection(iter([body[:-9], body[-9:]]))
    asyncio.run(exchange(connection, Engine(), encoding="gzip"))
    *answers, last = connection.lines
    assert [line["label"] for line in answers] == ["a", "b"][: len(answers)]
    assert set(last) == {"error"}
    assert last["error"].startswith(sentence)
    assert connection.finished


@pytest.mark.parametrize("body", [b'"a"\n', b""])
def test_a_stream_in_another_encoding_than_it_declares_is_an_error(
    body: bytes,
) -> None:
    connection = Connection(iter([body]))
    with pytest.raises(BadRequest, match="gzip data"):
        asyncio.run(exchange(connection, Engine(), encoding="gzip"))
    assert connection.status is None


def test_a_line_over_the_limit_names_the_limit_and_its_setting() -> None:
    connection = Connection(iter([b'"' + b"x" * 2000 + b'"\n"a"\n']))
    asyncio.run(exchange(connection, Engine()))
    problem, answer = connection.lines
    assert "longer than the 1000 bytes" in problem["error"]
    assert "--max-body-bytes, EVALMODE_MAX_BODY_BYTES" in problem["error"]
    assert answer["label"] == "a"
