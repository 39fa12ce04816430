"""Connections that are slow, too long, or not HTTP, to a real server with a tiny application."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
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
    with pytest.MonkeyPatch.context() as environment:
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
    """All bytes until the server ends the connection. Raises OSError after a reset."""
    return b"".join(iter(lambda: connection.recv(65_536), b""))


def read_answer(connection: socket.socket) -> tuple[bytes, bytes]:
    """The head and the body of the next answer."""
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
    """The status and the sentence of a refusal, which ends its connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert b"content-type: application/json" in lines
    assert b"connection: close" in lines
    assert b"content-length: %d" % len(body) in lines
    error = json.loads(body)
    assert set(error) == {"error", "field"}
    assert error["field"] is None
    return int(head.split(b" ")[1]), error["error"]


def test_a_request_in_pieces_is_answered(connect):
    connection = connect()
    for index in range(len(GET)):
        connection.sendall(GET[index : index + 1])
    assert read_answer(connection)[0].startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("sent", [b"", b"\r\n\r\n", b"G", b"GET / HTTP/1.1\r\nhost: x\r\n"])
def test_a_head_that_does_not_arrive_in_time_is_408(connect, sent):
    started = time.monotonic()
    connection = connect()
    connection.sendall(sent)
    status, sentence = refusal(rest_of(connection))
    assert (status, sentence) == (408, "no complete request head arrived within 0.6 s")
    assert time.monotonic() - started >= HEAD_S


def test_a_head_that_trickles_is_408_although_bytes_keep_arriving(connect):
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
    assert read_answer(connection)[1].startswith(b"pid ")
    connection.sendall(b"GET /")
    assert refusal(rest_of(connection))[0] == 408


def test_an_idle_connection_is_closed_without_an_answer(connect):
    connection = connect()
    connection.sendall(GET)
    read_answer(connection)
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
def test_a_head_that_is_too_long_is_431_complete_or_not(connect, head):
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
def test_a_request_that_is_not_http_or_has_two_lengths_is_400(connect, request_):
    connection = connect()
    connection.sendall(request_)
    status, sentence = refusal(rest_of(connection))
    assert status == 400
    assert sentence


def test_a_refusal_is_sent_after_the_answers_to_earlier_requests(connect, gate):
    connection = connect()
    connection.sendall(GET.replace(b"/ ", b"/gate ") + b"nonsense\r\n\r\n")
    # When this later connection is answered, the server has read the nonsense of the first one.
    refused = connect()
    refused.sendall(b"nonsense\r\n\r\n")
    rest_of(refused)
    gate.touch()
    first, second = rest_of(connection).split(b"HTTP/1.1 400", 1)
    gate.unlink()
    assert first.startswith(b"HTTP/1.1 200 ")
    assert refusal(b"HTTP/1.1 400" + second)[0] == 400


def test_a_bad_chunk_of_a_waiting_request_does_not_affect_the_request_before(connect, gate):
    connection = connect()
    bad = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"
    connection.sendall(GET.replace(b"/ ", b"/gate ") + bad)
    gate.touch()
    first, second = rest_of(connection).split(b"HTTP/1.1 400", 1)
    gate.unlink()
    assert first.startswith(b"HTTP/1.1 200 ")
    assert refusal(b"HTTP/1.1 400" + second)[0] == 400


@pytest.mark.parametrize("piece_bytes", [1, 7, 100_000])
def test_an_upgrade_request_is_ignored_and_the_body_is_read(connect, piece_bytes):
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


def test_an_upgrade_request_hides_no_second_length(connect):
    connection = connect()
    connection.sendall(
        b"POST / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\ncontent-length:"
        b" 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    )
    assert refusal(rest_of(connection))[0] == 400


def test_after_an_early_answer_the_rest_of_the_body_is_read_and_the_next_request_is_answered(
    connect,
):
    connection = connect()
    connection.sendall(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 6\r\n\r\nabc")
    assert read_answer(connection)[1] == b"no"
    connection.sendall(b"def" + GET)
    assert read_answer(connection)[1].startswith(b"pid ")


def test_the_body_of_an_answered_request_may_not_trickle_for_ever(connect):
    connection = connect()
    connection.sendall(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
    assert read_answer(connection)[1] == b"no"
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
    """Send empty lines now and then. Only a write shows that the connection was cut off."""
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
    _, body = read_answer(connection)
    assert len(body) == 64_000_000


def test_slow_and_silent_connections_do_not_affect_others_and_are_all_refused(connect, server):
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


# Many requests, and clients that do not read the answers.


def memory_mb(server, field: str) -> float:
    """VmRSS, or its peak VmHWM, of a server of one process."""
    status = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))


def connect_to(server, certificate: Path | None) -> socket.socket:
    connection = server.connect(timeout_s=WAIT_S)
    if certificate is None:
        return connection
    context = ssl.create_default_context(cafile=certificate / "cert")
    return context.wrap_socket(connection, server_hostname="127.0.0.1")


@pytest.fixture(params=["plain", "tls"])
def certificate_or_none(request) -> Path | None:
    """The folder of a certificate, or None for a server without TLS."""
    return request.getfixturevalue("certificate") if request.param == "tls" else None


def tls_settings(certificate: Path | None) -> dict[str, Path]:
    if certificate is None:
        return {}
    return {"ssl_certfile": certificate / "cert", "ssl_keyfile": certificate / "key"}


def test_300_000_requests_whose_answers_are_never_read_take_no_memory_and_end_with_their_connection(
    certificate_or_none,
):
    def flood(greedy: socket.socket, other: socket.socket) -> None:
        # The kernel's buffers may take all of them, so the flood goes on until the server hangs up.
        deadline_s = time.monotonic() + WAIT_S
        requests = 0
        while requests < 300_000 or time.monotonic() < deadline_s:
            greedy.sendall(GET * 1000)
            requests += 1000
            other.sendall(GET)
            assert read_answer(other)[1].startswith(b"pid ")

    limits = {"body_timeout_s": READ_S, **tls_settings(certificate_or_none)}
    with (
        processes.running(Path("tiny"), program=PROGRAM, workers=1, **limits) as server,
        connect_to(server, certificate_or_none) as other,
        connect_to(server, certificate_or_none) as greedy,
    ):
        other.sendall(GET)
        read_answer(other)
        before_mb = memory_mb(server, "VmRSS")
        with pytest.raises(OSError, match=r"reset|Broken pipe|EOF|violation"):
            flood(greedy, other)
        assert memory_mb(server, "VmHWM") - before_mb < 20


def test_10_000_requests_at_once_are_answered_in_order_although_the_client_reads_slowly(
    certificate_or_none,
):
    bodies = [b"%06d" % number * 500 for number in range(10_000)]
    head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3000\r\n\r\n"
    trusted = certificate_or_none and ssl.create_default_context(
        cafile=certificate_or_none / "cert"
    )

    async def ask(port: int) -> None:
        # the reader holds 8 KB at most, so the kernel's buffers fill up
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusted, limit=4096)
        for body in bodies:
            writer.write(head + body)
        for number, body in enumerate(bodies):
            if number % 1000 == 0:
                await asyncio.sleep(0.2)  # the slowness itself
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert await reader.readexactly(3000) == body
        writer.close()
        await writer.wait_closed()

    with processes.running(
        Path("tiny"), program=PROGRAM, workers=1, **tls_settings(certificate_or_none)
    ) as server:
        before_mb = memory_mb(server, "VmRSS")
        asyncio.run(ask(server.port))
        assert memory_mb(server, "VmHWM") - before_mb < 20


@pytest.mark.parametrize("piece_bytes", [1, 7, 1000])
def test_requests_of_every_kind_in_pieces_of_any_size_are_answered_one_by_one(connect, piece_bytes):
    kinds = [
        GET,
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 8\r\n\r\n\r\n\r\n\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        b"4\r\n\r\n\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        b"\r\n\r\n" + GET,
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        b"1\r\nc\r\n0\r\nx: y\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n"
        b"content-length: 1\r\n\r\nd",
    ]
    echoes = [b"pid ", b"\r\n" * 4, b"\r\n\r\nab", b"pid ", b"c", b"d"]
    connection = connect()
    requests = b"".join(kinds * 3)
    for start in range(0, len(requests), piece_bytes):
        connection.sendall(requests[start : start + piece_bytes])
    stream = connection.makefile("rb")
    for echo in echoes * 3:
        assert stream.readline().startswith(b"HTTP/1.1 200 ")
        headers = dict(line.lower().split(b": ", 1) for line in iter(stream.readline, b"\r\n"))
        assert stream.read(int(headers[b"content-length"])).startswith(echo)


def test_a_client_that_reads_a_large_answer_slowly_gets_it_whole(connect):
    """It reads a little all the time, for longer than a client may read nothing."""
    connection = connect()
    connection.sendall(GET.replace(b"/ ", b"/large "))
    received_bytes, started = 0, time.monotonic()
    while time.monotonic() < started + 3 * READ_S:
        received_bytes += len(connection.recv(65_536))
        time.sleep(0.01)  # the slowness itself
    while received_bytes < 64_000_000:
        piece = connection.recv(1 << 20)
        assert piece, "the connection ended"
        received_bytes += len(piece)


def test_bytes_that_are_parsed_in_tiny_pieces_hold_others_up_only_for_moments(connect):
    chunks = b"100000\r\n" + b"\r\n\r\n" * (1 << 18) + b"\r\n0\r\n\r\n"
    head = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    tedious, other = connect(), connect()
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(tedious.sendall, b"\r\n" * 100_000 + head + chunks)
        slowest_s = 0.0
        while not sent.done():
            started = time.monotonic()
            other.sendall(GET)
            read_answer(other)
            slowest_s = max(slowest_s, time.monotonic() - started)
        sent.result()
    stream = tedious.makefile("rb")
    assert stream.readline().startswith(b"HTTP/1.1 200 ")
    while stream.readline() != b"\r\n":
        pass
    assert stream.read(1 << 20) == b"\r\n\r\n" * (1 << 18)
    assert slowest_s < READ_S


# Clients that close their sending side.


@pytest.mark.parametrize(
    "request_",
    [GET, b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nwhole", GET * 500],
)
def test_requests_followed_by_a_half_close_are_answered(connect, request_):
    connection = connect()
    connection.sendall(request_)
    connection.shutdown(socket.SHUT_WR)
    answers = rest_of(connection)
    assert answers.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answers.count(b"HTTP/1.1 ") == answers.count(b"pid ") + answers.count(b"whole")
    assert answers.count(b"HTTP/1.1 200 ") == max(1, request_.count(GET))


def test_a_slow_answer_is_sent_after_a_half_close(connect, gate):
    connection = connect()
    connection.sendall(b"POST /gate HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nwhole")
    connection.shutdown(socket.SHUT_WR)
    # The server sends the first bytes of the answer early, to see whether the client is there.
    assert connection.recv(100) == b"HTTP/1.1 "
    gate.touch()
    answer = rest_of(connection)
    gate.unlink()
    assert answer.startswith(b"200 OK\r\n")
    assert answer.endswith(b"whole")


def test_a_client_that_is_gone_is_noticed_although_it_looks_like_a_half_close(connect, server):
    def connections() -> int:
        return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))

    before = connections()
    connection = connect()
    connection.sendall(GET.replace(b"/ ", b"/kept "))
    until = time.monotonic() + WAIT_S
    while connections() == before and time.monotonic() < until:
        time.sleep(0.01)
    assert connections() == before + 1
    connection.close()
    while connections() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert connections() == before


@pytest.mark.parametrize("sent", [b"", b"\r\n", GET])
def test_a_half_close_between_requests_ends_the_connection_without_an_answer(connect, sent):
    connection = connect()
    connection.sendall(sent)
    if sent == GET:
        read_answer(connection)
    connection.shutdown(socket.SHUT_WR)
    assert rest_of(connection) == b""


POST_100 = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"
POST_CHUNKS = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "sentence"),
    [
        (POST_100 + b"nine byte", "the body ends after 9 of 100 bytes"),
        (POST_100, "the body ends after 0 of 100 bytes"),
        (POST_100 + b"\r\n\r\n" * 24 + b"abc", "the body ends after 99 of 100 bytes"),
        (POST_CHUNKS, "the body ends after 0 bytes, before its last chunk"),
        (
            POST_CHUNKS + b"5\r\nabcde\r\n3\r\nf",
            "the body ends after 6 bytes, before its last chunk",
        ),
        (POST_CHUNKS + b"2\r\nab\r\n0\r\n", "the body ends after 2 bytes, before its last chunk"),
        (
            POST_CHUNKS + b"800\r\n" + b"\r\n\r\n" * 512 + b"\r\n5\r\n",
            "the body ends after 2048 bytes, before its last chunk",
        ),
        (b"G", "the request head ends after 1 byte, before its empty line"),
        (GET[:-2], f"the request head ends after {len(GET) - 2} bytes, before its empty line"),
    ],
)
@pytest.mark.parametrize("before", [b"", GET, GET * 3, b"\r\n\r\n" * 300])
def test_a_half_close_before_the_end_of_a_request_is_400_and_says_where_it_ends(
    connect, sent, sentence, before
):
    connection = connect()
    connection.sendall(before + sent)
    connection.shutdown(socket.SHUT_WR)
    answers = rest_of(connection)
    first, status_line, last = answers.partition(b"HTTP/1.1 400 ")
    assert first.count(b"HTTP/1.1 200 ") == before.count(b"GET")
    assert refusal(status_line + last) == (400, sentence)


def test_a_half_close_in_the_body_of_an_answered_request_only_ends_the_connection(connect):
    connection = connect()
    connection.sendall(POST_100.replace(b"/ ", b"/early ") + b"abc")
    assert read_answer(connection)[1] == b"no"
    connection.shutdown(socket.SHUT_WR)
    assert rest_of(connection) == b""


def test_a_refusal_below_v2_has_the_form_of_the_protocol(connect):
    connection = connect()
    connection.sendall(POST_100.replace(b"/ ", b"/v2/models/x/infer ") + b"abc")
    connection.shutdown(socket.SHUT_WR)
    body = rest_of(connection).partition(b"\r\n\r\n")[2]
    assert json.loads(body) == {"error": "the body ends after 3 of 100 bytes"}


@pytest.mark.parametrize(
    "sent",
    [GET, POST_100, b"DELETE /v2/models HTTP/1.1\r\nhost: x\r\n\r\n", b"\r\n" + GET, b"hello\r\n"],
)
def test_plain_http_at_the_port_of_tls_gets_the_advice_to_use_https(certificate, sent):
    with (
        processes.running(
            Path("tiny"), program=PROGRAM, workers=1, **tls_settings(certificate)
        ) as server,
        server.connect(timeout_s=WAIT_S) as plain,
    ):
        plain.sendall(sent)
        head, _, body = rest_of(plain).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"] == "this port speaks TLS: use https://"
        with connect_to(server, certificate) as proper:
            proper.sendall(GET)
            assert read_answer(proper)[1].startswith(b"pid ")


def test_a_client_of_the_tls_port_that_sends_nothing_is_closed_after_the_time_for_a_head(
    certificate,
):
    limits = {"header_timeout_s": HEAD_S, **tls_settings(certificate)}
    with (
        processes.running(Path("tiny"), program=PROGRAM, workers=1, **limits) as server,
        server.connect(timeout_s=WAIT_S) as silent,
        server.connect(timeout_s=WAIT_S) as half,
        server.connect(timeout_s=WAIT_S) as gone,
    ):
        gone.close()
        half.sendall(b"G")
        assert b"no complete request head arrived within 0.6 s" in rest_of(half)
        assert rest_of(silent) == b""


# Sentences for clients.


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        (b"http:///livez", "the address http:///livez names no host"),
        (b"http://:80/", "the address http://:80/ names no host"),
        (b"http://x:65536/", "the address http://x:65536/ has a port that is not a number from 0"),
        (b"http://x:99999999999/", "has a port that is not a number from 0 to 65535"),
        (b"http://x:abc/", "has a port that is not a number from 0 to 65535"),
        (b"http://[::1/", "the address http://[::1/ "),
    ],
)
def test_an_address_that_cannot_be_parsed_is_400_and_says_why(connect, address, problem):
    connection = connect()
    connection.sendall(b"GET %s HTTP/1.1\r\nhost: x\r\n\r\n" % address)
    status, sentence = refusal(rest_of(connection))
    assert status == 400
    assert problem in sentence
    assert sentence.endswith(": send a path that begins with /")


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\n\r\n", "this server is no proxy"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "this is TLS, and the server speaks"),
    ],
)
def test_requests_for_a_proxy_or_for_tls_are_refused_by_name(connect, request_, sentence):
    connection = connect()
    connection.sendall(request_)
    assert sentence in refusal(rest_of(connection))[1]


@pytest.mark.parametrize("address", [b"http://x", b"http://x?y", b"http://x:65535/", b"http://x/"])
def test_a_whole_address_is_answered_as_its_path(connect, address):
    connection = connect()
    connection.sendall(b"GET %s HTTP/1.1\r\nhost: x\r\n\r\n" % address)
    assert read_answer(connection)[1].startswith(b"pid ")


@pytest.mark.parametrize("trailers", [b"a: b\r\n" * 300_000, b"a: " + b"b" * 2_000_000])
def test_trailers_have_the_limit_of_heads(connect, trailers):
    connection = connect()
    head = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"
    connection.sendall(head + trailers)
    status, sentence = refusal(rest_of(connection))
    assert status == 431
    assert sentence.startswith("chunk sizes and trailers are longer than the ")
