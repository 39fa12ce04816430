"""`evalmode predict --input`, against a test server that can misbehave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from evalmode.client.transfer import CHUNK_BYTES, CHUNK_LINES
from evalmode.service.ndjson import WINDOW_BYTES, WINDOW_ROWS

EVALMODE = str(Path(sys.executable).with_name("evalmode"))
DIGEST = "a" * 64
WAIT_S = 60


class Handler(BaseHTTPRequestHandler):
    """Answers each line with itself as the label, unless the server's `misbehave` returns true."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        lines = body.decode().splitlines()
        with self.server.lock:
            number = self.server.request_count
            self.server.request_count += 1
            self.server.requests.append((self.path, dict(self.headers), lines))
        if self.server.misbehave(self, number, lines):
            return
        self.answer(lines)

    def answer(self, lines: list[str], *, digest: str = DIGEST, only: int | None = None) -> None:
        """Send all answers, or `only` so many and a part of the next before the connection ends."""
        lines_out = [_answer(index, line) for index, line in enumerate(lines)]
        self.send_response(200)
        self.send_header("content-type", "application/x-ndjson")
        self.send_header("x-evalmode-digest", digest)
        self.send_header("content-length", str(sum(map(len, lines_out))))
        self.end_headers()
        self.wfile.write(
            b"".join(lines_out if only is None else [*lines_out[:only], lines_out[only][:7]])
        )
        if only is not None:
            self.close_connection = True

    def refuse(self, status: int, sentence: str, **headers: str) -> bool:
        body = json.dumps({"error": sentence}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return True

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the test killed the client

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.request_count = 0
        self.requests: list[tuple[str, dict[str, str], list[str]]] = []
        self.misbehave: Callable[[Handler, int, list[str]], Any] = lambda handler, number, lines: (
            False
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def _answer(index: int, line: str) -> bytes:
    try:
        asked = json.loads(line)
    except ValueError:
        return (
            json.dumps({"index": index, "error": "not valid JSON"}, separators=(",", ":")).encode()
            + b"\n"
        )
    text = asked if isinstance(asked, str) else asked["text"]
    answer = {
        "index": index,
        "label": text,
        "score": 0.5,
        "truncated": False,
        "top": [{"label": text, "score": 0.5}],
    }
    return json.dumps(answer, separators=(",", ":")).encode() + b"\n"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as started:
        thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield started
        started.shutdown()
        thread.join()


def predict(*arguments: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The ended process of `evalmode predict ARGUMENTS`."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("EVALMODE_")
    }
    return subprocess.run(
        [EVALMODE, "predict", *map(str, arguments)],
        cwd=cwd,
        check=False,
        timeout=WAIT_S,
        env=environment | options.pop("env", {}),
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


def texts_in(folder: Path, count: int = 1000) -> list[str]:
    texts = [f"text {number}" for number in range(count)]
    (folder / "texts.jsonl").write_text("".join(f"{json.dumps(text)}\n" for text in texts))
    return texts


def labels_of(answers: Path) -> list[str]:
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(len(lines)))
    return [line["label"] for line in lines]


def to(server: Server, *more: object) -> tuple[object, ...]:
    return ("--url", server.url, "--input", "texts.jsonl", "--output", "answers.jsonl", *more)


def test_a_request_is_no_larger_than_the_window_of_a_server() -> None:
    assert (CHUNK_LINES, CHUNK_BYTES) == (WINDOW_ROWS, WINDOW_BYTES)


def test_every_line_is_answered_in_order_over_several_connections(
    server: Server, tmp_path: Path
) -> None:
    texts = texts_in(tmp_path, 5000)
    # The first two requests are answered after the others.
    server.misbehave = lambda handler, number, lines: time.sleep(0.2 if number < 2 else 0)
    process = predict(
        *to(server, "--chunk-lines", 100, "--model", "m/2", "--top-k", 2, "--api-key", "k"),
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    assert labels_of(tmp_path / "answers.jsonl") == texts
    assert max(len(lines) for _, _, lines in server.requests) == 100
    path, headers, _ = server.requests[0]
    assert path == "/v1/predict?top_k=2&truncate=true&model=m&version=2"
    assert headers["authorization"] == "Bearer k"
    assert b"5,000" in process.stderr


def test_a_temporary_refusal_is_retried_after_the_wait_that_the_server_asks_for(
    server: Server, tmp_path: Path
) -> None:
    texts = texts_in(tmp_path, 100)
    times: list[float] = []

    def misbehave(handler: Handler, number: int, lines: list[str]) -> bool:
        times.append(time.monotonic())
        refusals = {
            0: (503, {"retry_after": "1"}),
            1: (429, {"retry_after": formatdate(usegmt=True)}),
            2: (502, {}),
        }
        if number not in refusals:
            return False
        status, headers = refusals[number]
        return handler.refuse(status, "too much waits already", **headers)

    server.misbehave = misbehave
    process = predict(*to(server), cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert labels_of(tmp_path / "answers.jsonl") == texts
    assert len(times) == 4
    assert times[1] - times[0] >= 1


def test_after_a_broken_stream_only_the_rest_is_sent_again(server: Server, tmp_path: Path) -> None:
    texts = texts_in(tmp_path, 100)

    def misbehave(handler: Handler, number: int, lines: list[str]) -> bool:
        if number < 3:
            handler.answer(lines, only=30)
        return number < 3

    server.misbehave = misbehave
    # A try that brings answers is progress, and not one of the failures in a row.
    process = predict(*to(server, "--retries", 1), cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert labels_of(tmp_path / "answers.jsonl") == texts
    assert [len(lines) for _, _, lines in server.requests] == [100, 70, 40, 10]


def test_a_stream_that_ends_with_an_error_line_is_retried(server: Server, tmp_path: Path) -> None:
    texts = texts_in(tmp_path, 10)

    def misbehave(handler: Handler, number: int, lines: list[str]) -> bool:
        if number:
            return False
        body = (
            b"".join(_answer(index, line) for index, line in enumerate(lines[:4]))
            + b'{"error":"stopping"}\n'
        )
        handler.send_response(200)
        for name, value in (
            ("content-type", "application/x-ndjson"),
            ("x-evalmode-digest", DIGEST),
        ):
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
        return True

    server.misbehave = misbehave
    assert predict(*to(server), cwd=tmp_path).returncode == 0
    assert labels_of(tmp_path / "answers.jsonl") == texts


def test_after_the_last_retry_it_says_how_to_continue_and_the_next_run_continues(
    server: Server, tmp_path: Path
) -> None:
    texts = texts_in(tmp_path, 1000)
    server.misbehave = lambda handler, number, lines: (
        number >= 3 and handler.refuse(503, "too much", retry_after="0")
    )
    given_up = predict(
        *to(server, "--chunk-lines", 100, "--concurrency", 1, "--retries", 2), cwd=tmp_path
    )
    assert given_up.returncode == 2
    message = given_up.stderr.decode()
    assert "did not answer in 3 tries: 503 Service Unavailable, too much" in message
    assert "300 lines are in answers.jsonl, and the same command continues from there" in message
    assert message.count("\n") == 1
    server.misbehave = lambda handler, number, lines: False
    request_count = server.request_count
    with (tmp_path / "answers.jsonl").open("ab") as cut:
        cut.write(b'{"index":300,"lab')  # as a kill leaves it
    assert predict(*to(server, "--chunk-lines", 100), cwd=tmp_path).returncode == 0
    assert labels_of(tmp_path / "answers.jsonl") == texts
    assert server.request_count == request_count + 7
    assert predict(*to(server), cwd=tmp_path).returncode == 0
    assert server.request_count == request_count + 7  # every line is answered


def test_a_killed_run_can_be_continued(server: Server, tmp_path: Path) -> None:
    texts = texts_in(tmp_path, 3000)
    reached = threading.Event()
    server.misbehave = lambda handler, number, lines: (
        number > 10 and (reached.set(), handler.refuse(503, "wait"))[1]
    )
    command = [EVALMODE, "predict", *map(str, to(server, "--chunk-lines", 50, "--retries", 100))]
    for ended, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        reached.clear()
        running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
        assert reached.wait(WAIT_S)
        running.send_signal(ended)
        _, message = running.communicate(timeout=WAIT_S)
        assert running.returncode == code, message
    assert b"interrupted; " in message
    assert b"the same command continues from there" in message
    server.misbehave = lambda handler, number, lines: False
    assert predict(*to(server), cwd=tmp_path).returncode == 0
    assert labels_of(tmp_path / "answers.jsonl") == texts


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "401 Unauthorized, no key"), (404, "404 Not Found"), (500, "500 Internal")],
)
def test_a_permanent_refusal_is_not_retried(
    server: Server, tmp_path: Path, status: int, message: str
) -> None:
    texts_in(tmp_path, 10)
    server.misbehave = lambda handler, number, lines: handler.refuse(status, "no key")
    process = predict(*to(server), cwd=tmp_path)
    assert (process.returncode, server.request_count) == (2, 1)
    assert message in process.stderr.decode()


def test_a_run_is_not_continued_with_another_model(server: Server, tmp_path: Path) -> None:
    texts_in(tmp_path, 1000)

    def misbehave(handler: Handler, number: int, lines: list[str]) -> bool:
        if number >= 5:
            handler.answer(lines, digest="b" * 64)
        return number >= 5

    server.misbehave = misbehave
    process = predict(*to(server, "--chunk-lines", 100, "--concurrency", 1), cwd=tmp_path)
    assert process.returncode == 2
    assert (
        f"has the digest {'b' * 16}, and the 500 lines in answers.jsonl are from {'a' * 16}"
        in process.stderr.decode()
    )
    assert len(labels_of(tmp_path / "answers.jsonl")) == 500


def test_a_run_is_not_continued_with_another_input_or_other_flags(
    server: Server, tmp_path: Path
) -> None:
    texts_in(tmp_path, 10)
    assert predict(*to(server), cwd=tmp_path).returncode == 0
    before = (tmp_path / "answers.jsonl").read_bytes()
    other = predict(*to(server, "--top-k", 9), cwd=tmp_path)
    assert b"was begun with another top_k" in other.stderr
    texts_in(tmp_path, 11)
    changed = predict(*to(server), cwd=tmp_path)
    assert b"was begun with another input" in changed.stderr
    (tmp_path / "answers.jsonl.evalmode.json").unlink()
    unknown = predict(*to(server), cwd=tmp_path)
    assert b"choose another --output" in unknown.stderr
    assert [process.returncode for process in (other, changed, unknown)] == [2, 2, 2]
    assert (tmp_path / "answers.jsonl").read_bytes() == before


def test_lines_with_errors_make_the_exit_code_1_in_later_runs_too(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "texts.jsonl").write_bytes(b'"a"\n{\n\n' + b"x" * (17 << 20) + b'\n"b"\n')
    for _ in range(2):
        process = predict(*to(server), cwd=tmp_path)
        assert process.returncode == 1, process.stderr
        lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
        assert [line["index"] for line in lines] == [0, 1, 2, 3]
        assert ["error" in line for line in lines] == [False, True, True, False]
    assert server.request_count <= 2


def test_a_txt_file_has_one_text_per_line_and_a_pipe_has_json_lines(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_bytes('\ufeffDit is "een" zin.\r\n\nÅ\u2028b'.encode() + b"\xff")
    process = predict("--url", server.url, "--input", "texts.txt", cwd=tmp_path)
    assert [json.loads(line)["label"] for line in process.stdout.split(b"\n")[:-1]] == [
        'Dit is "een" zin.',
        "",
        "Å\u2028b\ufffd",
    ]
    piped = predict("--url", server.url, "--input", "-", cwd=tmp_path, input=b'"a"\n{"text": "b"}')
    assert [json.loads(line)["label"] for line in piped.stdout.splitlines()] == ["a", "b"]
    assert piped.returncode == 0


def test_a_text_from_a_pipe_is_answered_before_the_next_one_arrives(
    server: Server, tmp_path: Path
) -> None:
    command = [EVALMODE, "predict", "--url", server.url, "--input", "-"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        for text in ("a", "b"):
            running.stdin.write(f'"{text}"\n'.encode())
            running.stdin.flush()
            assert json.loads(running.stdout.readline())["label"] == text
        running.send_signal(signal.SIGINT)  # while it waits for more
        assert running.wait(WAIT_S) == 130


def test_a_closed_pipe_and_a_full_disk_are_one_sentence(server: Server, tmp_path: Path) -> None:
    texts_in(tmp_path, 1000)
    flags = ("--url", server.url, "--input", "texts.jsonl")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        process = predict(*flags, cwd=tmp_path, stdout=closed)
    assert process.returncode == 2
    assert process.stderr.startswith(b"evalmode: stdout cannot be written: Broken pipe; ")
    assert process.stderr.count(b"\n") == 1
    with open("/dev/full", "wb") as full:
        process = predict(*flags, cwd=tmp_path, stdout=full)
    assert process.returncode == 2
    assert process.stderr.startswith(
        b"evalmode: stdout cannot be written: No space left on device; "
    )
