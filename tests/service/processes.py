"""A real server process on a port of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

READY_S = 30.0
END_S = 5.0
SERVER = ("-m", "evalmode.service.process.server")


@dataclass(frozen=True, kw_only=True)
class RunningServer:
    """A running server: where it is, what it wrote when it began, and its process."""

    url: str
    port: int
    started: dict[str, object]
    process: subprocess.Popen[str]
    sockets: ExitStack

    def connect(self, *, timeout_s: float) -> socket.socket:
        """A connection to it, which is closed at the latest when `running` ends."""
        address = ("127.0.0.1", self.port)
        return self.sockets.enter_context(socket.create_connection(address, timeout=timeout_s))

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


def environment(bundle: Path, **settings: object) -> dict[str, str]:
    """The environment of a server process.

    Unlike a server in production, it lets a request in however long the queue is expected to take:
    the estimate depends on how busy the machine is. A test of that refusal sets `queue_s`.
    """
    given = {
        "bundle": bundle,
        "port": 0,
        "log_format": "json",
        "access_log": 0,
        "drain_s": 0,
        "parallel": 2,
        "queue_s": 60,
        **settings,
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EVALMODE_")}
    return kept | {f"EVALMODE_{name.upper()}": str(value) for name, value in given.items()}


@contextmanager
def running(
    bundle: Path, *, program: tuple[str, ...] = SERVER, **settings: object
) -> Iterator[RunningServer]:
    """A server process that has said that it serves."""
    process = subprocess.Popen(
        [sys.executable, *program],
        env=environment(bundle, **settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        started = _started(process)
        url = str(started["url"])
        with ExitStack() as sockets:
            yield RunningServer(
                url=url,
                port=int(url.rpartition(":")[2]),
                started=started,
                process=process,
                sockets=sockets,
            )
    finally:
        if "workers" in settings:
            process.terminate()  # a supervisor that is killed leaves it to its workers to tidy up
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=END_S)
        process.kill()
        process.communicate()


def ended(
    bundle: Path, *, program: tuple[str, ...] = SERVER, **settings: object
) -> subprocess.CompletedProcess[str]:
    """A server process that ended by itself."""
    return subprocess.run(
        [sys.executable, *program],
        env=environment(bundle, **settings),
        capture_output=True,
        text=True,
        timeout=READY_S,
        check=False,
    )


def refused(bundle: Path, **settings: object) -> str:
    """The sentence with which a server refuses to start; it is one, without a traceback, and the
    exit code is 2.
    """
    process = ended(bundle, **settings)
    assert process.returncode == 2, process.stderr
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1, process.stderr
    return process.stderr


def _started(process: subprocess.Popen[str]) -> dict[str, object]:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if '"serving"' in line:
            return json.loads(line)
    raise AssertionError(f"the server did not start: {''.join(seen)}")
