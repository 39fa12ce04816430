"""The lines that a server process writes to stderr, with a real uvicorn."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import structlog

from evalmode.service.batching.bucket import Bucket
from evalmode.service.batching.proof import Violation
from evalmode.service.telemetry.logs import LineHandler, ViolationLog

SERVER = """
import logging
import socket
import sys

import structlog
import uvicorn
from fastapi import FastAPI, Request

from evalmode.service.http.middleware import add_middleware
from evalmode.service.telemetry.logs import configure_logs
from evalmode.service.telemetry.metrics import Metrics
from evalmode.service.settings import Settings

configure_logs(sys.argv[1])
log = structlog.get_logger("evalmode.service")
app = FastAPI()

@app.post("/crash")
async def crash(request: Request):
    text = (await request.json())["text"]
    raise ZeroDivisionError("a crash of the tests")

@app.post("/logs")
async def logs(request: Request):
    text = (await request.json())["text"]
    log.info("ours", count=len(text))
    logging.getLogger("a.library").warning("theirs: %s", "a thing")

add_middleware(app, Settings(), Metrics())
whole = app.middleware_stack

async def unfinished(scope, receive, send):
    if scope["type"] == "http" and scope["path"] == "/unfinished":
        return
    await whole(scope, receive, send)

from evalmode.service.http.middleware import RequestMiddleware
outer = RequestMiddleware(unfinished, metrics=Metrics())
async def application(scope, receive, send):
    layer = outer if scope.get("path") == "/unfinished" else whole
    await layer({**scope, "app": app}, receive, send)

listener = socket.socket()
listener.bind(("127.0.0.1", 0))
log.info("serving", port=listener.getsockname()[1])
config = uvicorn.Config(application, log_config=None, access_log=False, reset_contextvars=True)
uvicorn.Server(config).run(sockets=[listener])
"""
TEXT = "a private text"


class Stderr:
    """The lines that a process has written until now."""

    def __init__(self, stream) -> None:
        self.lines: list[str] = []
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._reader.start()

    def _read(self, stream) -> None:
        try:
            for line in stream:
                with self._more:
                    self.lines.append(line)
                    self._more.notify_all()
        except OSError:  # how a terminal reports its end
            pass

    def line(self, words: str) -> str:
        """The first line with these words. Waits until there is one."""
        with self._more:
            assert self._more.wait_for(
                lambda: any(words in line for line in self.lines), timeout=30
            ), self.lines
            return next(line for line in self.lines if words in line)

    def json(self, event: str) -> dict:
        return json.loads(self.line(f'"event":"{event}'))


@contextmanager
def running(form: str, *, terminal: bool = False) -> Iterator[tuple[httpx.Client, Stderr]]:
    master, slave = pty.openpty() if terminal else os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, form], stderr=slave, stdin=subprocess.DEVNULL
    )
    os.close(slave)
    with os.fdopen(master, encoding="utf-8", errors="replace") as stream:
        stderr = Stderr(stream)
        try:
            # On a terminal lines have colours.
            plain = re.sub(r"\x1b\[[0-9;]*m", "", stderr.line("serving"))
            port = re.search(r"port\W+(\d+)", plain)[1]
            with httpx.Client(
                base_url=f"http://127.0.0.1:{port}", headers={"x-request-id": "mine"}
            ) as client:
                yield client, stderr
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[httpx.Client, Stderr]]:
    with running("json") as client_and_stderr:
        yield client_and_stderr


def test_all_lines_of_a_request_have_its_id_whatever_logger_wrote_them(server):
    client, stderr = server
    client.post("/logs", json={"text": TEXT})
    for event, logger in (
        ("ours", "evalmode.service"),
        ("theirs", "a.library"),
        ("request", "evalmode.access"),
    ):
        line = stderr.json(event)
        assert (line["request_id"], line["logger"]) == ("mine", logger)
        assert line["level"]
        assert line["timestamp"].endswith("Z")


def test_a_crash_is_one_line_with_its_traceback_and_the_id(server):
    client, stderr = server
    assert client.post("/crash", json={"text": TEXT}).status_code == 500
    line = stderr.json("request crashed")
    assert line["request_id"] == "mine"
    assert "ZeroDivisionError: a crash of the tests" in line["exception"]
    assert sum("ZeroDivisionError" in line for line in stderr.lines) == 1


def test_uvicorns_own_line_about_a_request_has_its_id(server):
    client, stderr = server
    assert client.get("/unfinished").status_code == 500
    assert stderr.json("ASGI callable returned")["request_id"] == "mine"


def test_a_line_outside_of_requests_has_no_id(server):
    _, stderr = server
    assert "request_id" not in stderr.json("serving")


def test_no_line_has_the_text_of_a_request(server):
    client, stderr = server
    client.post(
        "/logs?q=query-secret",
        json={"text": TEXT},
        headers={"x-request-id": "the-last", "x-api-key": "k" * 20},
    )
    stderr.line("the-last")
    everything = "".join(stderr.lines)
    assert not [secret for secret in (TEXT, "query-secret", "k" * 20) if secret in everything]


def test_on_a_terminal_a_traceback_shows_no_values():
    with running("auto", terminal=True) as (client, stderr):
        client.post("/crash", json={"text": TEXT})
        stderr.line("ZeroDivisionError: a crash of the tests")
        client.post("/logs", json={"text": TEXT}, headers={"x-request-id": "the-last"})
        stderr.line("the-last")
        assert TEXT not in re.sub(r"\x1b\[[0-9;]*m", "", "".join(stderr.lines))


def test_lines_that_are_not_read_are_lost_and_the_next_one_says_how_many():
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        handler = LineHandler(stream)
        os.set_blocking(reader, False)

        def log(words: str) -> None:
            handler.emit(logging.LogRecord("a.library", logging.INFO, "", 0, words, None, None))

        log("whole")
        log("x" * 200_000)  # more than the pipe holds, so it is cut
        for _ in range(2):
            log("lost")
        read = os.read(reader, 1 << 20).decode()
        assert read.startswith("whole\nxxx")
        assert not read.endswith("\n")
        log("read again")
        lines = os.read(reader, 1 << 20).decode()
        assert lines == "\n3 lines before this one were lost: nothing read them\nread again\n"
    os.close(reader)


def test_a_process_whose_stderr_is_closed_goes_on():
    program = (
        "import structlog; from evalmode.service.telemetry.logs import configure_logs;"
        " configure_logs('auto'); structlog.get_logger('evalmode.service').info('event');"
        " print('went on')"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "went on\n"


def test_a_violation_is_logged_with_all_that_reproduces_it():
    bucket = Bucket(
        model="m",
        version="1",
        digest="d",
        label="8",
        positions=8,
        run=list,
        costs={1: 1.0},
    )
    violation = Violation(
        bucket=bucket,
        row_digest="r2 ids[1, 8]",
        batch_digests=("r1 ids[1, 8]", "r2 ids[1, 8]"),
        position=1,
        batch_size=4,
        expected_sha256="e",
        actual_sha256="a",
    )
    with structlog.testing.capture_logs() as logged:
        ViolationLog().proved(bucket, None)
        ViolationLog().proved(bucket, violation)
    assert logged == [
        {
            "event": "determinism violation",
            "log_level": "error",
            "model": "m",
            "version": "1",
            "digest": "d",
            "bucket": "8",
            "row": "r2 ids[1, 8]",
            "batch": ["r1 ids[1, 8]", "r2 ids[1, 8]"],
            "place": 1,
            "places": 4,
            "expected": "e",
            "actual": "a",
        }
    ]
