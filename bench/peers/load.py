"""The load: `wrk` with requests that it reads from a file.

wrk is a closed loop: each of its connections sends the next request when it has an answer. It is
written in C, so that the load generator takes little of the processor that the server needs too.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from formats import Request

SCRIPT = Path(__file__).with_name("requests.lua")


class NoLoadGeneratorError(Exception):
    """wrk is not installed."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What wrk measured. `errors` are failed connections and answers of 400 and above."""

    requests: int
    seconds: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    errors: int

    @property
    def per_s(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


def require_wrk() -> str:
    """The path of wrk. Raises NoLoadGeneratorError if it is not installed."""
    path = shutil.which("wrk")
    if path is None:
        raise NoLoadGeneratorError(
            "wrk is not installed: `apt-get install wrk`, or https://github.com/wg/wrk"
        )
    return path


def write_requests(path: Path, url: str, requests: Sequence[Request]) -> None:
    """Write the requests to a server at `url` as `requests.lua` reads them."""
    with path.open("wb") as file:
        for request in requests:
            headers = {
                "host": urlsplit(url).netloc,
                **request.headers,
                "content-length": str(len(request.body)),
            }
            lines = [f"POST {request.path} HTTP/1.1"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            message = "\r\n".join([*lines, "", ""]).encode() + request.body
            file.write(b"%010d" % len(message) + message)


@contextmanager
def loading(
    url: str, requests_file: Path, *, connections: int, seconds: int
) -> Iterator[subprocess.Popen[str]]:
    """wrk while it loads a server; it ends after `seconds`, or with the context."""
    command = [require_wrk(), "--threads=1", f"--connections={connections}"]
    command += [f"--duration={seconds}s", "--timeout=30s", f"--script={SCRIPT}"]
    with subprocess.Popen(
        [*command, url, "--", str(requests_file)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def measure(url: str, requests_file: Path, *, connections: int, seconds: int) -> Load:
    """Load a server for `seconds`."""
    with loading(url, requests_file, connections=connections, seconds=seconds) as process:
        output, _ = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"wrk ended with exit code {process.returncode}: {output}")
        return Load(**json.loads(output.splitlines()[-1]))
