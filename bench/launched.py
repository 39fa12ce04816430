"""A real server process for the figures of this folder: started by its command, ready when it says
so.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server: its address, its process, and the seconds from its start until it was
    ready.
    """

    url: str
    process: subprocess.Popen[str]
    start_s: float

    def resident_mb(self, field: str = "VmRSS") -> float:
        """VmRSS or VmHWM of the process, in megabytes."""
        found = re.search(
            rf"{field}:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text()
        )
        assert found
        return int(found[1]) / 1024


@contextmanager
def served(bundle: str | Path, *flags: str) -> Iterator[Server]:
    """A server on a free port, until the end of the block."""
    started = time.perf_counter()
    command = [
        Path(sys.executable).with_name("evalmode"),
        "serve",
        str(bundle),
        "--port",
        "0",
        *flags,
    ]
    with (
        tempfile.NamedTemporaryFile("w+") as log,
        subprocess.Popen(
            command, stderr=log, text=True, env={**os.environ, "EVALMODE_LOG_FORMAT": "json"}
        ) as process,
    ):
        try:
            while not (found := re.search(r'"url": "([^"]+)"', Path(log.name).read_text())):
                if process.poll() is not None:
                    sys.exit(Path(log.name).read_text())
                time.sleep(0.002)  # the resolution of the figure
            httpx.get(f"{found[1]}/readyz").raise_for_status()
            yield Server(url=found[1], process=process, start_s=time.perf_counter() - started)
        finally:
            process.terminate()
