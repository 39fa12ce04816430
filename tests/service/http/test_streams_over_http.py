"""Streams of lines through a real server process."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from evalmode.service.predictor import Predictor
from tests.service import processes
from tests.service.bundles import make_bundle

WAIT_S = 30
NDJSON = {"content-type": "application/x-ndjson"}


def stream(url: str, body: Any, query: str = "") -> httpx.Response:
    return httpx.post(f"{url}/v1/predict{query}", content=body, headers=NDJSON, timeout=WAIT_S)


def test_a_text_in_a_stream_gets_the_same_bits_as_alone_in_process(service, bundle, texts) -> None:
    chance = random.Random(5)
    sample = chance.choices(texts, k=1000)
    lines = [
        json.dumps(text if index % 2 else {"text": text, "id": index})
        for index, text in enumerate(sample)
    ]
    answer = stream(service.url, "\n".join(lines).encode(), "?top_k=2")
    assert answer.status_code == 200
    assert answer.headers["x-evalmode-digest"] == service.started["digest"]
    with Predictor.open(bundle, parallel=1) as predictor:
        alone = {text: predictor.predict([text], top_k=2)[0] for text in set(sample)}
    for index, (text, line) in enumerate(zip(sample, answer.text.splitlines(), strict=True)):
        prediction, expected = json.loads(line), alone[text]
        assert prediction["index"] == index
        assert prediction.get("id") == (None if index % 2 else index)
        assert prediction["top"] == [
            {"label": scored.label, "score": scored.score} for scored in expected.top
        ]
        assert prediction["truncated"] == expected.truncated


@pytest.mark.parametrize(
    ("query", "status", "field"),
    [("?top_k=0", 422, "top_k"), ("?model=nobody", 404, None), ("?color=red", 422, "color")],
)
def test_a_wrong_query_is_refused_with_a_status(service, query, status, field) -> None:
    answer = stream(service.url, b'"a"\n', query)
    assert answer.status_code == status
    assert answer.json()["field"] == field


def test_a_body_above_the_limit_of_other_requests_is_answered_in_constant_memory(
    service,
) -> None:
    def resident_kib() -> int:
        with open(f"/proc/{service.process.pid}/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))

    line = json.dumps({"text": "Ez egy rövid mondat. " * 100}).encode() + b"\n"
    assert stream(service.url, line * 100).status_code == 200
    before = resident_kib()
    sent = 0

    # Writes and reads in turn, as few clients do: no buffer holds the answers of so many lines.
    with socket.create_connection(("127.0.0.1", service.port), timeout=WAIT_S) as connection:
        head = (
            "POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type:"
            f" {NDJSON['content-type']}\r\nconnection: close\r\n"
        )
        connection.sendall(head.encode() + f"content-length: {len(line) * 10_000}\r\n\r\n".encode())
        tail = b""
        while sent < 10_000:
            connection.sendall(line * 100)
            sent += 100
            connection.setblocking(False)
            try:
                while chunk := connection.recv(1 << 16):
                    tail = (tail + chunk)[-2000:]
            except BlockingIOError:
                pass
            connection.settimeout(WAIT_S)
        while chunk := connection.recv(1 << 16):
            tail = (tail + chunk)[-2000:]
    assert b'{"index":9999,' in tail
    assert resident_kib() - before < 20_000


def test_answers_arrive_while_the_body_is_being_sent(service) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=WAIT_S) as connection:
        connection.sendall(
            b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-ndjson\r\n"
        )
        connection.sendall(b'transfer-encoding: chunked\r\n\r\n4\r\n"a"\n\r\n')
        for index in range(3):
            received = b""
            while b"}]}\n" not in received:
                received += connection.recv(4096)
            assert b'{"index":%d,' % index in received
            connection.sendall(b'4\r\n"a"\n\r\n')
        connection.sendall(b"0\r\n\r\n")
        assert b'{"index":3,' in connection.recv(4096)


def rows_run(service) -> float:
    figures = httpx.get(f"{service.url}/metrics", timeout=WAIT_S).text.splitlines()
    name = "evalmode_batch_rows_sum"
    return sum(float(line.rpartition(" ")[2]) for line in figures if line.startswith(name))


def send_until_closed(connection: socket.socket, body: bytes) -> None:
    with suppress(OSError):
        connection.sendall(body)


@pytest.mark.parametrize("repeats", [1, 512])
def test_the_lines_of_a_client_that_disconnects_are_not_answered(bundle, repeats) -> None:
    """A stream does not fetch all of the second body ahead: only a write shows the disconnect."""
    compressor = zlib.compressobj(9, wbits=-15)
    block = compressor.compress(b'"a"\n' * 1_000_000) + compressor.flush(zlib.Z_FULL_FLUSH)
    assert len(block) < 5_000
    body = block * repeats  # after a full flush a block may follow any other one
    with processes.running(bundle) as service:
        with socket.create_connection(("127.0.0.1", service.port), timeout=WAIT_S) as connection:
            connection.sendall(
                b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-ndjson\r\n"
                b"content-encoding: deflate\r\ncontent-length: %d\r\n\r\n" % len(body)
            )
            sending = threading.Thread(target=send_until_closed, args=(connection, body))
            sending.start()
            received = b""
            while b'{"index":1000,' not in received:
                received = received[-100:] + connection.recv(4096)
            connection.shutdown(socket.SHUT_RDWR)
            sending.join()
        end = time.monotonic() + WAIT_S
        before, now = -1.0, rows_run(service)
        while before != now:
            assert time.monotonic() < end
            time.sleep(0.5)
            before, now = now, rows_run(service)
        assert 1000 < now < 250_000


def test_an_open_stream_ends_with_a_last_line_when_the_server_stops(
    bundle,
) -> None:
    with processes.running(bundle, drain_s=0, workers=1) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
            connection.sendall(
                b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-ndjson\r\n"
            )
            connection.sendall(b'transfer-encoding: chunked\r\n\r\n4\r\n"a"\n\r\n')
            received = b""
            while b"}]}\n" not in received:
                received += connection.recv(4096)
            began = time.monotonic()
            server.terminate()
            while b"0\r\n\r\n" not in received and (more := connection.recv(4096)):
                received += more
            assert b'{"error":"the server is stopping' in received
            assert received.endswith(b"0\r\n\r\n")
        assert server.process.wait(WAIT_S) == 0
        assert time.monotonic() - began < 10


def test_a_swap_does_not_change_the_model_of_an_open_stream(tmp_path) -> None:
    make_bundle(tmp_path, version="1")
    with (
        processes.running(tmp_path, poll_s=0.02) as server,
        socket.create_connection(("127.0.0.1", server.port)) as sock,
    ):
        sock.settimeout(WAIT_S)
        sock.sendall(
            b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-ndjson\r\n"
        )
        sock.sendall(b'transfer-encoding: chunked\r\n\r\n4\r\n"a"\n\r\n')
        received = b""
        while b"}]}\n" not in received:
            received += sock.recv(4096)
        assert f"x-evalmode-digest: {server.started['digest']}".encode() in received
        make_bundle(tmp_path, version="2", labels=("v", "w", "x", "y", "z"))
        end = time.monotonic() + WAIT_S
        while (newer := httpx.get(f"{server.url}/v1/model", timeout=WAIT_S).json())[
            "version"
        ] != "2":
            assert time.monotonic() < end
            time.sleep(0.01)
        sock.sendall(b'8\r\n"a"\n"a"\n\r\n0\r\n\r\n')
        while not received.endswith(b"0\r\n\r\n"):
            received += sock.recv(4096)
        answers = [
            json.loads(line) for line in received.splitlines() if line.startswith(b'{"index"')
        ]
        assert [answer.pop("index") for answer in answers] == [0, 1, 2]
        assert answers[0] == answers[1] == answers[2]
        after = stream(server.url, b'"a"\n')
        assert after.headers["x-evalmode-digest"] == newer["digest"] != server.started["digest"]
        assert json.loads(after.text)["label"] in "vwxyz"


def run_predict(*arguments: object, folder: Path) -> subprocess.CompletedProcess[bytes]:
    command = [Path(sys.executable).with_name("evalmode"), "predict", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=WAIT_S)


def test_a_file_gets_the_same_bytes_from_a_server_and_in_process(
    service, bundle, texts, tmp_path
) -> None:
    lines = [json.dumps(text) for text in texts] + [
        "",
        "{",
        '{"text": "a", "id": "\\udc00"}',
        '{"id": 1}',
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    files = ("--input", "texts.jsonl", "--output")
    there = run_predict("--url", service.url, *files, "there.jsonl", folder=tmp_path)
    here = run_predict("--bundle", bundle, *files, "here.jsonl", folder=tmp_path)
    assert (there.returncode, here.returncode) == (1, 1), there.stderr + here.stderr
    content = (tmp_path / "there.jsonl").read_bytes()
    assert content == (tmp_path / "here.jsonl").read_bytes()
    answers = [json.loads(line) for line in content.splitlines()]
    assert ["error" in line for line in answers] == [False] * len(texts) + [True, False, True]
    alone = run_predict("--json", "--bundle", bundle, texts[1], folder=tmp_path)
    (prediction,) = json.loads(alone.stdout)["predictions"]
    assert answers[1] == {"index": 1, **prediction}


def test_answers_of_a_server_can_be_completed_in_process(service, bundle, texts, tmp_path) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(f"{json.dumps(text)}\n" for text in texts))
    files = ("--input", "texts.jsonl", "--output", "answers.jsonl")
    assert run_predict("--url", service.url, *files, folder=tmp_path).returncode == 0
    complete = (tmp_path / "answers.jsonl").read_bytes()
    (tmp_path / "answers.jsonl").write_bytes(complete[: len(complete) // 2])
    assert run_predict("--bundle", bundle, *files, folder=tmp_path).returncode == 0
    assert (tmp_path / "answers.jsonl").read_bytes() == complete
