"""Connections that are slow, too long, or no HTTP, against a real server process with an
application of a few lines.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.service import processes

PROGRAM = (str(Path(__file__).with_name("tiny_server.py")),)
WAIT_S = 30
HEAD_S = 0.6
READ_S = 1.0
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    return tmp_path_factory.mktemp("gate") / "open"


@pytest.fixture(scope="module")
def server(gate):
    with (
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv("TINY_GATE", str(gate))
        limits = {
            "header_timeout_s": HEAD_S,
            "body_timeout_s": READ_S,
            "max_header_bytes": 1000,
            "keep_alive_s": 1,
        }
        with processes.running(
            Path("tiny"), program=PROGRAM, workers=1, drain_s=0, **limits
        ) as running:
            yield running


@pytest.fixture
def connect(server):
    opened = []

    def connection() -> socket.socket:
        opened.append(socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S))
        return opened[-1]

    yield connection
    for each in opened:
        each.close()


def rest_of(connection: socket.socket) -> bytes:
    """Everything until the server ends the connection; raises when it does so with a reset."""
    return b"".join(iter(lambda: connection.recv(65_536), b""))


def one_answer(connection: socket.socket) -> tuple[bytes, bytes]:
    """The next answer: head and body."""
    stream = connection.makefile("rb")
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline()
        assert line, f"the connection ended within {head!r}"
        head += line
    length = int(
        next(
            line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
        ).split(b":")[1]
    )
    return head, stream.read(length)


def refusal(answer: bytes) -> tuple[int, str]:
    """Status and sentence of a refusal that ends its connection; it has the form that every error
    has.
    """
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert b"content-type: application/json" in lines
    assert b"connection: close" in lines
    assert b"content-length: %d" % len(body) in lines
    found = json.loads(body)
    assert set(found) == {"error"}
    return int(head.split(b" ")[1]), found["error"]


def test_a_request_in_pieces_is_answered(connect):
    connection = connect()
    for place in range(len(GET)):
        connection.sendall(GET[place : place + 1])
    assert one_answer(connection)[0].startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("sent", [b"", b"\r\n\r\n", b"G", b"GET / HTTP/1.1\r\nhost: x\r\n"])
def test_a_head_that_does_not_come_in_time_is_408(connect, sent):
    started = time.monotonic()
    connection = connect()
    connection.sendall(sent)
    status, sentence = refusal(rest_of(connection))
    assert (status, sentence) == (408, "no whole request head came within 0.6 s")
    assert time.monotonic() - started >= HEAD_S


def test_a_head_that_trickles_is_408_although_something_always_comes(connect):
    connection = connect()
    ended = threading.Event()

    def trickle() -> None:
        while not ended.wait(0.05):
            try:
                connection.sendall(b"GET / HTTP/1.1\r\nx: " if not sent else b"y")
            except OSError:
                return
            sent.append(1)

    sent: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        pool.submit(trickle)
        answer = rest_of(connection)
        ended.set()
    assert refusal(answer)[0] == 408


def test_the_second_request_of_a_connection_has_the_same_time_from_its_first_byte(connect):
    connection = connect()
    connection.sendall(GET)
    assert one_answer(connection)[1].startswith(b"pid ")
    connection.sendall(b"GET /")
    assert refusal(rest_of(connection))[0] == 408


def test_a_connection_that_lies_idle_is_closed_without_a_word(connect):
    connection = connect()
    connection.sendall(GET)
    one_answer(connection)
    assert rest_of(connection) == b""


@pytest.mark.parametrize(
    "head",
    [
        b"GET /%s HTTP/1.1\r\nhost: x\r\n\r\n" % (b"a" * 1000),
        b"GET / HTTP/1.1\r\nhost: x\r\na: %s\r\n\r\n" % (b"a" * 1000),
        b"GET / HTTP/1.1\r\nhost: x\r\n"
        + b"".join(b"a%d: b\r\n" % number for number in range(200))
        + b"\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"a" * 1000,
        b"GET /" + b"a" * 100_000,
    ],
)
def test_a_head_that_is_too_long_is_431_whether_it_ends_or_not(connect, head):
    connection = connect()
    connection.sendall(head)
    status, sentence = refusal(rest_of(connection))
    assert status == 431
    assert "1000 bytes" in sentence


def test_the_length_of_one_head_does_not_count_for_the_next(connect):
    connection = connect()
    request = b"POST / HTTP/1.1\r\nhost: x\r\na: %s\r\ncontent-length: 5000\r\n\r\n%s" % (
        b"a" * 800,
        b"b" * 5000,
    )
    connection.sendall(request * 3)
    stream = connection.makefile("rb")
    for _ in range(3):
        assert stream.readline().startswith(b"HTTP/1.1 200 ")
        while stream.readline() != b"\r\n":
            pass
        assert stream.read(5000) == b"b" * 5000


@pytest.mark.parametrize(
    "request_",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\na b: c\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nbad\x00name: c\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        (
            b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding:"
            b" chunked\r\n\r\n0\r\n\r\n"
        ),
        (
            b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length:"
            b" 3\r\n\r\n0\r\n\r\n"
        ),
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding : chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
    ],
)
def test_what_is_not_http_or_says_two_things_of_its_length_is_400(connect, request_):
    connection = connect()
    connection.sendall(request_)
    status, sentence = refusal(rest_of(connection))
    assert status == 400
    assert sentence


def test_a_refusal_comes_after_the_answers_before_it(connect, gate):
    connection = connect()
    connection.sendall(GET.replace(b"/ ", b"/gate ") + b"nonsense\r\n\r\n")
    # the nonsense has been read by the time that this later connection is answered
    refused = connect()
    refused.sendall(b"nonsense\r\n\r\n")
    rest_of(refused)
    gate.touch()
    first, second = rest_of(connection).split(b"HTTP/1.1 400", 1)
    gate.unlink()
    assert first.startswith(b"HTTP/1.1 200 ")
    assert refusal(b"HTTP/1.1 400" + second)[0] == 400


def test_a_bad_chunk_of_a_request_that_waits_for_its_turn_leaves_the_one_before_it_alone(
    connect, gate
):
    connection = connect()
    bad = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"
    connection.sendall(GET.replace(b"/ ", b"/gate ") + bad)
    gate.touch()
    first, second = rest_of(connection).split(b"HTTP/1.1 400", 1)
    gate.unlink()
    assert first.startswith(b"HTTP/1.1 200 ")
    assert refusal(b"HTTP/1.1 400" + second)[0] == 400


@pytest.mark.parametrize("piece_bytes", [1, 7, 100_000])
def test_a_wish_for_another_protocol_is_ignored_and_the_body_is_read(connect, piece_bytes):
    connection = connect()
    request = (
        b"POST / HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n"
        b"http2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\ncontent-length: 5\r\n\r\nhello" + GET
    )
    for start in range(0, len(request), piece_bytes):
        connection.sendall(request[start : start + piece_bytes])
    stream = connection.makefile("rb")
    assert stream.readline().startswith(b"HTTP/1.1 200 ")
    while stream.readline() != b"\r\n":
        pass
    assert stream.read(5) == b"hello"
    assert stream.readline().startswith(b"HTTP/1.1 200 ")


def test_a_wish_for_another_protocol_hides_no_second_length(connect):
    connection = connect()
    connection.sendall(
        b"POST / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\ncontent-length:"
        b" 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    )
    assert refusal(rest_of(connection))[0] == 400


def test_an_answer_before_the_body_is_read_to_the_end_and_the_next_request_is_answered(connect):
    connection = connect()
    connection.sendall(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 6\r\n\r\nabc")
    assert one_answer(connection)[1] == b"no"
    connection.sendall(b"def" + GET)
    assert one_answer(connection)[1].startswith(b"pid ")


def test_a_body_that_nobody_waits_for_may_not_trickle_for_ever(connect):
    connection = connect()
    connection.sendall(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
    assert one_answer(connection)[1] == b"no"
    started = time.monotonic()
    connection.settimeout(0.05)
    while time.monotonic() - started < WAIT_S:
        connection.sendall(b"x")
        try:
            assert connection.recv(10) == b""
            break
        except TimeoutError:
            pass
    assert READ_S / 2 <= time.monotonic() - started < WAIT_S


def write_until(connection: socket.socket, until: float) -> None:
    """Send empty lines now and then: a connection that was cut off shows when one writes."""
    while time.monotonic() < until:
        connection.sendall(b"\r\n")
        time.sleep(0.02)


def test_a_client_that_does_not_read_its_answer_is_cut_off(connect):
    connection = connect()
    connection.sendall(GET.replace(b"/ ", b"/large "))
    connection.recv(10)
    started = time.monotonic()
    with pytest.raises(OSError, match=r"reset|Broken pipe"):
        write_until(connection, started + WAIT_S)
    assert time.monotonic() - started >= READ_S / 2


def test_a_client_that_reads_a_large_answer_gets_it_whole(connect):
    connection = connect()
    connection.sendall(GET.replace(b"/ ", b"/large "))
    _, body = one_answer(connection)
    assert len(body) == 64_000_000


def test_slow_and_silent_connections_take_nothing_from_others_and_are_all_refused(connect, server):
    idle = [connect() for _ in range(500)]
    for connection in idle[:250]:
        connection.sendall(b"GET / HT")
    with httpx.Client(base_url=server.url, timeout=WAIT_S) as client:
        assert all(client.get("/").status_code == 200 for _ in range(20))
    assert {refusal(rest_of(connection))[0] for connection in idle} == {408}


def test_an_answer_without_a_body_is_sent(connect):
    connection = connect()
    connection.sendall(GET.replace(b"GET", b"HEAD") + GET)
    stream = connection.makefile("rb")
    assert stream.readline().startswith(b"HTTP/1.1 200 ")
    while stream.readline() != b"\r\n":
        pass
    assert stream.readline().startswith(b"HTTP/1.1 200 ")


def test_head_and_body_of_an_answer_come_in_one_packet(connect):
    connection = connect()
    for _ in range(20):
        connection.sendall(GET)
        assert b"\r\n\r\npid " in connection.recv(65_536)
