"""How a real server process with a tiny application ends: it answers every accepted request."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.service import processes

PROGRAM = (str(Path(__file__).with_name("tiny_server.py")),)
WAIT_S = 30
IN_FLIGHT = 256
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture
def run(gate):
    @contextmanager
    def running(**settings: object) -> Iterator[object]:
        with processes.running(
            Path("tiny"), program=PROGRAM, **{"workers": 1, "drain_s": 0, **settings}
        ) as server:
            yield server

    return running


def connect(server) -> socket.socket:
    return server.connect(timeout_s=WAIT_S)


def begin_request(server, path: str = "/gate", *, length_bytes: int = 5) -> socket.socket:
    """A connection whose request the application has begun to read: the server wants the body."""
    connection = connect(server)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length:"
        f" {length_bytes}\r\n\r\n"
    )
    connection.sendall(head.encode())
    assert connection.recv(1024).startswith(b"HTTP/1.1 100 ")
    return connection


def rest_of(connection: socket.socket) -> bytes:
    """All bytes until the server ends the connection. Raises OSError after a reset."""
    return b"".join(iter(lambda: connection.recv(65_536), b""))


def read_answer(connection: socket.socket) -> bytes:
    """One complete answer to `GET /`."""
    answer = b""
    while b"pid " not in answer:
        answer += (received := connection.recv(65_536))
        assert received, f"the connection ended within {answer!r}"
    return answer


def announces_close(answer: bytes) -> bool:
    return b"\r\nconnection: close\r\n" in answer.lower()


def wait_until_refused(server) -> None:
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        try:
            connect(server).close()
        except OSError:
            return
    raise AssertionError("the server still accepts connections")


def events_until_end(server) -> list[str]:
    """The events in the log until the server ends, which it does with exit code 0."""
    _, logged = server.process.communicate(timeout=WAIT_S)
    assert server.process.returncode == 0, logged
    assert "Traceback" not in logged
    return [json.loads(line)["event"] for line in logged.splitlines()]


def test_256_requests_in_flight_at_sigterm_are_256_answers(run, gate):
    with run() as server:
        connections = [begin_request(server) for _ in range(IN_FLIGHT)]
        for connection in connections[::2]:
            connection.sendall(b"whole")
        server.terminate()
        wait_until_refused(server)
        for connection in connections[1::2]:
            connection.sendall(b"whole")
        gate.touch()
        answers = [rest_of(connection) for connection in connections]
        assert events_until_end(server) == ["draining", "stopped"]
    assert (
        sum(answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"whole") for answer in answers)
        == IN_FLIGHT
    )
    assert all(announces_close(answer) for answer in answers)


def test_a_draining_server_is_not_ready_and_answers_on_old_and_new_connections(run):
    with run(drain_s=WAIT_S) as server, httpx.Client(base_url=server.url, timeout=WAIT_S) as client:
        assert client.get("/readyz").status_code == 200
        old = connect(server)
        old.sendall(GET)
        assert not announces_close(read_answer(old))
        server.terminate()
        assert "draining" in server.process.stderr.readline()
        old.sendall(GET)
        assert announces_close(rest_of(old))
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()) == (503, {"error": "the server is stopping"})
        assert answer.headers["connection"] == "close"
        assert client.get("/livez").status_code == 200
        assert client.post("/", content=b"new").text == "new"
        server.terminate()  # a second signal does not wait for the drain to end
        assert events_until_end(server) == ["stopped"]


def test_a_server_stops_listening_after_the_drain(run):
    with run(drain_s=0.5) as server:
        started = time.monotonic()
        server.terminate()
        assert "draining" in server.process.stderr.readline()
        connection = connect(server)
        connection.sendall(GET)
        assert announces_close(rest_of(connection))
        wait_until_refused(server)
        assert events_until_end(server) == ["stopped"]
        assert time.monotonic() - started >= 0.5


def test_an_interrupt_does_not_wait_for_the_drain(run):
    with run(drain_s=WAIT_S) as server:
        server.process.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert events_until_end(server) == ["draining", "stopped"]
        assert time.monotonic() - started < WAIT_S / 2


def test_connections_that_wait_in_the_kernel_at_the_end_are_answered(run):
    with run() as server:
        os.kill(server.process.pid, signal.SIGSTOP)
        connections = [connect(server) for _ in range(100)]
        for connection in connections[:50]:
            connection.sendall(GET)
        server.terminate()
        os.kill(server.process.pid, signal.SIGCONT)
        assert "draining" in server.process.stderr.readline()
        # The server waits a second for the first request of a client that has just connected.
        for connection in connections[50:]:
            connection.sendall(GET)
        answers = [rest_of(connection) for connection in connections]
        assert events_until_end(server) == ["stopped"]
    assert sum(answer.startswith(b"HTTP/1.1 200 ") for answer in answers) == 100


def test_a_request_that_arrives_on_an_old_connection_with_the_signal_is_answered(run):
    with run() as server:
        connections = [connect(server) for _ in range(50)]
        for connection in connections:
            connection.sendall(GET)
            read_answer(connection)
        os.kill(server.process.pid, signal.SIGSTOP)
        server.terminate()
        for connection in connections:
            connection.sendall(GET)
        os.kill(server.process.pid, signal.SIGCONT)
        answers = [rest_of(connection) for connection in connections]
        assert events_until_end(server) == ["draining", "stopped"]
    assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)


def test_clients_that_keep_asking_get_complete_answers_and_clean_ends_only(run):
    def keep_asking(server) -> str:
        count = 0
        while True:
            try:
                connection = connect(server)
            # The kernel resets a handshake that is not complete when the listener closes.
            except (ConnectionRefusedError, ConnectionResetError):
                return f"{count > 0}"
            with connection:
                while True:
                    connection.sendall(GET)
                    answer = connection.recv(65_536)
                    count += answer.startswith(b"HTTP/1.1 200 ")
                    if not answer or announces_close(answer):
                        break

    with run(drain_s=0.5) as server, ThreadPoolExecutor(16) as pool:
        asking = [pool.submit(keep_asking, server) for _ in range(16)]
        begin_request(server, "/").close()
        server.terminate()
        assert {each.result(WAIT_S) for each in asking} == {"True"}
        assert events_until_end(server) == ["draining", "stopped"]


def test_idle_connections_do_not_delay_the_end_and_end_without_a_reset(run):
    with run() as server:
        connections = [connect(server) for _ in range(50)]
        for connection in connections:
            connection.sendall(GET)
            read_answer(connection)
        server.terminate()
        started = time.monotonic()
        for connection in connections:
            assert rest_of(connection) == b""
            connection.sendall(GET)  # like a client that has not noticed the end
        for connection in connections:
            assert rest_of(connection) == b""
        events_until_end(server)
        assert time.monotonic() - started < 10


def test_half_a_head_delays_the_end_no_longer_than_the_limit_for_heads(run):
    with run(header_timeout_s=1, grace_s=WAIT_S) as server:
        connection = connect(server)
        connection.sendall(GET[:10])
        server.terminate()
        started = time.monotonic()
        assert rest_of(connection).startswith(b"HTTP/1.1 408 ")
        events_until_end(server)
        assert time.monotonic() - started < WAIT_S / 2


def test_half_a_head_that_is_completed_in_time_is_answered(run):
    with run() as server:
        connection = connect(server)
        connection.sendall(GET[:10])
        server.terminate()
        wait_until_refused(server)
        connection.sendall(GET[10:])
        assert rest_of(connection).startswith(b"HTTP/1.1 200 ")
        events_until_end(server)


def test_requests_not_answered_within_the_grace_get_503_and_the_exit_code_is_0(run):
    with run(grace_s=1) as server:
        connections = [begin_request(server, "/kept") for _ in range(3)]
        for connection in connections:
            connection.sendall(b"whole")
        server.terminate()
        for connection in connections:
            answer = rest_of(connection)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"].startswith(
                "the server stopped before"
            )
        assert events_until_end(server) == ["draining", "given up", "stopped"]


def test_a_third_signal_gives_up_requests_in_flight(run):
    with run(grace_s=WAIT_S, drain_s=WAIT_S) as server:
        connection = begin_request(server, "/kept")
        connection.sendall(b"whole")
        started = time.monotonic()
        server.terminate()
        assert "draining" in server.process.stderr.readline()
        server.terminate()
        wait_until_refused(server)
        server.terminate()
        assert rest_of(connection).startswith(b"HTTP/1.1 503 ")
        assert events_until_end(server) == ["given up", "stopped"]
        assert time.monotonic() - started < WAIT_S


def test_the_process_ends_without_an_application_that_does_not_close(run, monkeypatch):
    monkeypatch.setenv("TINY_CLOSING", "never")
    with run(grace_s=1) as server:
        server.terminate()
        assert events_until_end(server)[-1] == "the application does not close: left without it"


def test_over_tls_requests_are_answered_and_the_end_is_graceful(run, certificate, gate):
    trusted = ssl.create_default_context(cafile=certificate / "cert")
    keys = {
        "ssl_certfile": certificate / "cert",
        "ssl_keyfile": certificate / "locked",
        "ssl_keyfile_password": "word",
    }
    with run(**keys, header_timeout_s=2) as server:
        assert server.url.startswith("https://127.0.0.1:")
        with (
            httpx.Client(base_url=server.url, verify=trusted, timeout=WAIT_S) as client,
            ThreadPoolExecutor(1) as pool,
        ):
            assert client.post("/", content=b"hello").text == "hello"
            assert (
                httpx.get(f"{server.url}/", verify=trusted, headers={"x": "y" * 20_000}).status_code
                == 431
            )
            silent = connect(server)  # never shakes hands
            later = pool.submit(client.post, "/gate", content=b"late")
            with trusted.wrap_socket(connect(server), server_hostname="127.0.0.1") as idle:
                idle.sendall(GET)
                read_answer(idle)
                server.terminate()
                assert idle.recv(1024) == b""
            gate.touch()
            answer = later.result(WAIT_S)
            assert (answer.text, answer.headers["connection"]) == ("late", "close")
        silent.close()
        assert events_until_end(server) == ["draining", "stopped"]


def test_with_authorities_only_clients_with_a_certificate_are_accepted(run, certificate):
    cert, key = certificate / "cert", certificate / "key"
    with run(ssl_certfile=cert, ssl_keyfile=key, ssl_ca_certs=cert) as server:
        trusted = ssl.create_default_context(cafile=cert)
        with pytest.raises(httpx.TransportError):
            httpx.get(server.url, verify=trusted)
        trusted.load_cert_chain(cert, key)
        assert httpx.get(server.url, verify=trusted).status_code == 200


def test_a_certificate_of_another_authority_and_plain_text_are_refused(run, certificate, tmp_path):
    command = "req -x509 -newkey rsa:2048 -nodes -days 2 -keyout key -out cert -subj /CN=other"
    subprocess.run(["openssl", *command.split()], cwd=tmp_path, check=True, capture_output=True)
    cert, key = certificate / "cert", certificate / "key"
    with run(ssl_certfile=cert, ssl_keyfile=key, ssl_ca_certs=cert) as server:
        stranger = ssl.create_default_context(cafile=cert)
        stranger.load_cert_chain(tmp_path / "cert", tmp_path / "key")
        with pytest.raises(httpx.TransportError):
            httpx.get(server.url, verify=stranger)
        plain = httpx.get(server.url.replace("https", "http"))
        assert (plain.status_code, plain.json()["field"]) == (400, None)
        assert plain.json()["error"] == "this port speaks TLS: use https://"
        trusted = ssl.create_default_context(cafile=cert)
        trusted.load_cert_chain(cert, key)
        assert httpx.get(server.url, verify=trusted).status_code == 200


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"ssl_certfile": "nowhere"}, "setting ssl_certfile: there is no file nowhere"),
        ({"ssl_keyfile": "{}/key"}, "setting ssl_keyfile is of no use without ssl_certfile"),
        ({"ssl_certfile": "{}/cert"}, "are no certificate with its private key"),
        (
            {"ssl_certfile": "{}/key", "ssl_keyfile": "{}/key"},
            "are no certificate with its private key",
        ),
        (
            {"ssl_certfile": "{}/cert", "ssl_keyfile": "{}/locked"},
            "ssl_keyfile_password is not its password",
        ),
        (
            {"ssl_certfile": "{}/cert", "ssl_keyfile": "{}/key", "ssl_ca_certs": "{}/key"},
            "holds no certificates",
        ),
    ],
)
def test_bad_tls_files_are_a_refusal_to_start_in_one_sentence(certificate, settings, problem):
    paths = {name: value.format(certificate) for name, value in settings.items()}
    done = processes.ended(Path("tiny"), program=PROGRAM, workers=1, **paths)
    assert done.returncode == 2
    assert done.stdout == ""
    assert problem in done.stderr
    assert len(done.stderr.splitlines()) == 1
