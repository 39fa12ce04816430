"""A real server process at its limit of connections, or of open files."""

from __future__ import annotations

import json
import resource
import socket
import ssl
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.service import processes

TINY = str(Path(__file__).with_name("tiny_server.py"))
PROGRAM = (TINY,)
WAIT_S = 30
SOON_S = 5

# A program: the tiny server with a limit of open files.
LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))
sys.argv = [{tiny!r}]
runpy.run_path({tiny!r}, run_name="__main__")
"""


def program_with_limit(files: int) -> tuple[str, str]:
    return ("-c", LIMITED.format(files=files, tiny=TINY))


def request(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode()


def rest_of(connection: socket.socket) -> bytes:
    """All bytes until the server ends the connection. Raises OSError after a reset."""
    return b"".join(iter(lambda: connection.recv(65_536), b""))


def ask(server, path: str, *, trusted: ssl.SSLContext | None = None) -> tuple[int, bytes]:
    """The status and the complete answer of one request on a new connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=SOON_S) as connection:
        if trusted is not None:
            connection = trusted.wrap_socket(connection, server_hostname="127.0.0.1")
        with connection:
            connection.sendall(request(path).replace(b"host", b"connection: close\r\nhost"))
            answer = rest_of(connection)
    return int(answer.split(b" ", 2)[1]), answer


def connect_many(server, count: int) -> list[socket.socket]:
    return [server.connect(timeout_s=WAIT_S) for _ in range(count)]


def wait_until_served(server) -> None:
    """Wait until requests other than health probes are answered again."""
    until = time.monotonic() + WAIT_S
    while ask(server, "/")[0] != 200:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_with_256_open_files_and_400_idle_sockets_probes_are_answered_and_others_get_503():
    with processes.running(
        Path("tiny"), program=program_with_limit(256), workers=1, header_timeout_s=4
    ) as server:
        idle = connect_many(server, 400)
        for _ in range(100):
            assert ask(server, "/livez")[0] == 200
            assert ask(server, "/readyz")[0] == 200
            status, answer = ask(server, "/")
            assert status == 503
            assert b"\r\nretry-after: 1\r\n" in answer
            assert "max_connections" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        statuses = Counter(rest_of(connection).split(b" ", 2)[1] for connection in idle)
        assert statuses.keys() == {b"408", b"503"}
        assert statuses[b"408"] > 100
        for connection in idle:
            connection.close()
        wait_until_served(server)


def test_the_limit_can_be_set_and_a_refused_connection_is_counted(bundle):
    with (
        processes.running(bundle, max_connections=8) as server,
        httpx.Client(base_url=server.url, timeout=WAIT_S) as client,
    ):
        client.get("/livez").raise_for_status()
        idle = connect_many(server, 7)
        assert ask(server, "/v1/model")[0] == 503
        assert ask(server, "/v2/health/ready")[0] == 200
        assert client.get("/v1/model").status_code == 200
        line = 'evalmode_rejections_total{reason="too_many_connections"} 1.0'
        assert line in client.get("/metrics").text.splitlines()
        for connection in idle:
            connection.close()


def test_a_connection_above_the_limit_carries_one_probe(gate):
    with processes.running(Path("tiny"), program=PROGRAM, workers=1, max_connections=8) as server:
        connect_many(server, 8)
        extra = server.connect(timeout_s=WAIT_S)
        extra.sendall(request("/livez") * 3)
        answer = rest_of(extra)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b"HTTP/1.1") == 1
        assert b"\r\nconnection: close\r\n" in answer
        silent = server.connect(timeout_s=WAIT_S)
        assert rest_of(silent).startswith(b"HTTP/1.1 503 ")


def test_over_tls_the_limit_is_the_same(certificate):
    trusted = ssl.create_default_context(cafile=certificate / "cert")
    keys = {"ssl_certfile": certificate / "cert", "ssl_keyfile": certificate / "key"}
    with processes.running(
        Path("tiny"), program=PROGRAM, workers=1, max_connections=8, **keys
    ) as server:
        connect_many(server, 100)  # none of them makes a TLS handshake
        assert ask(server, "/livez", trusted=trusted)[0] == 200
        assert ask(server, "/", trusted=trusted)[0] == 503


@pytest.fixture(params=["plain", "tls"])
def trusted(request) -> ssl.SSLContext | None:
    """The TLS context of the clients of the two workers, or None for plain HTTP."""
    if request.param == "plain":
        return None
    return ssl.create_default_context(cafile=request.getfixturevalue("certificate") / "cert")


@pytest.fixture
def two_workers(trusted, request):
    """Two workers that accept eight connections each."""
    limits = {"workers": 2, "max_connections": 8, "header_timeout_s": WAIT_S}
    if trusted is not None:
        folder = request.getfixturevalue("certificate")
        limits |= {"ssl_certfile": folder / "cert", "ssl_keyfile": folder / "key"}
    with processes.running(Path("tiny"), program=PROGRAM, **limits) as server:
        yield server


def test_a_worker_at_its_limit_leaves_connections_to_one_that_has_room(two_workers, trusted):
    """A few may get 503: a worker without a processor for 20 ms comes too late for a connection."""
    connect_many(two_workers, 12)
    statuses = Counter(ask(two_workers, "/", trusted=trusted)[0] for _ in range(40))
    assert statuses[200] >= 30, statuses


def test_above_the_limit_of_all_workers_probes_are_answered_and_others_get_503(
    two_workers, trusted
):
    idle = connect_many(two_workers, 40)
    for _ in range(4):  # over TLS a refusal lingers for two seconds
        assert ask(two_workers, "/livez", trusted=trusted)[0] == 200
        status, answer = ask(two_workers, "/", trusted=trusted)
        assert status == 503
        assert b"\r\nretry-after: 1\r\n" in answer
        sentence = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert "max_connections (--max-connections, EVALMODE_MAX_CONNECTIONS)" in sentence
    for connection in idle:
        connection.close()
    until = time.monotonic() + WAIT_S
    while ask(two_workers, "/", trusted=trusted)[0] != 200:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_without_any_file_descriptor_left_connections_get_503_and_old_ones_are_answered():
    with processes.running(Path("tiny"), program=PROGRAM, workers=1) as server:
        pid = server.process.pid
        old = server.connect(timeout_s=WAIT_S)
        old.sendall(request("/"))
        assert old.recv(65_536).startswith(b"HTTP/1.1 200 ")
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        open_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_files, before[1]))
        started = time.monotonic()
        for _ in range(50):
            status, answer = ask(server, "/")
            assert status == 503
            assert b"no file descriptors left" in answer
            old.sendall(request("/"))
            assert old.recv(65_536).startswith(b"HTTP/1.1 200 ")
        assert time.monotonic() - started < SOON_S
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        assert ask(server, "/")[0] == 200


@pytest.mark.parametrize(
    ("files", "settings", "sentence"),
    [
        (64, {}, "the limit of 64 open files has no room for connections: raise it"),
        (256, {"max_connections": 250}, "but the limit of 256 open files has room for"),
    ],
)
def test_more_connections_than_open_files_are_a_refusal_to_start(files, settings, sentence):
    done = processes.ended(Path("tiny"), program=program_with_limit(files), workers=1, **settings)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
