"""Real server processes, each on a free port."""

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
    """A running server: its address, the first line of its log, and its process."""

    url: str
    port: int
    started: dict[str, object]
    process: subprocess.Popen[str]
    sockets: ExitStack

    def connect(self, *, timeout_s: float) -> socket.socket:
        """A connection to the server, which `running` closes at its end."""
        address = ("127.0.0.1", self.port)
        return self.sockets.enter_context(socket.create_connection(address, timeout=timeout_s))

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


def environment(bundle: Path, **settings: object) -> dict[str, str]:
    """The environment of a server process.

    Unlike a server in production, it accepts requests whatever the expected wait in the queue: the
    estimate depends on how busy the machine is. A test of that refusal sets `queue_s`.
    """
    values = {
        "bundle": bundle,
        "port": 0,
        "log_format": "json",
        "access_log": 0,
        "drain_s": 0,
        # One process starts sooner. A test of several says so.
        "workers": 1,
        "parallel": 2,
        "queue_s": 60,
        **settings,
    }
    others = {name: value for name, value in os.environ.items() if not name.startswith("EVALMODE_")}
    return others | {f"EVALMODE_{name.upper()}": str(value) for name, value in values.items()}


@contextmanager
def running(
    bundle: Path, *, program: tuple[str, ...] = SERVER, **settings: object
) -> Iterator[RunningServer]:
    """A server process that is ready."""
    process = subprocess.Popen(
        [sys.executable, *program],
        env=environment(bundle, **settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        started = _first_log_line(process)
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
            process.terminate()  # a killed supervisor cannot remove the folder of the metrics
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=END_S)
        process.kill()
        process.communicate()


def ended(
    bundle: Path, *, program: tuple[str, ...] = SERVER, **settings: object
) -> subprocess.CompletedProcess[str]:
    """A server process that has ended by itself."""
    return subprocess.run(
        [sys.executable, *program],
        env=environment(bundle, **settings),
        capture_output=True,
        text=True,
        timeout=READY_S,
        check=False,
    )


def refused(bundle: Path, **settings: object) -> str:
    """The one line on stderr of a server that refuses to start with exit code 2."""
    process = ended(bundle, **settings)
    assert process.returncode == 2, process.stderr
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1, process.stderr
    return process.stderr


def _first_log_line(process: subprocess.Popen[str]) -> dict[str, object]:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if '"serving"' in line:
            return json.loads(line)
    raise AssertionError(f"the server did not start: {''.join(lines)}")
