"""Starts a real server process with its command line, for the measurements in this folder."""

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
    """A running server: its address, its process, and the seconds until it was ready."""

    url: str
    process: subprocess.Popen[str]
    start_s: float

    def resident_mb(self, field: str = "VmRSS") -> float:
        """VmRSS or VmHWM of the process, in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(rf"{field}:\s+(\d+) kB", status)
        assert match
        return int(match[1]) / 1024


@contextmanager
def served(bundle: str | Path, *flags: str) -> Iterator[Server]:
    """A server of `bundle` on a free port, while the context is open.

    It is one process, whose memory is measured, unless the flags say otherwise.
    """
    started = time.perf_counter()
    command = [Path(sys.executable).with_name("evalmode"), "serve", str(bundle)]
    command += ["--port", "0", "--workers", "1", *flags]
    environment = {**os.environ, "EVALMODE_LOG_FORMAT": "json"}
    with (
        tempfile.NamedTemporaryFile("w+") as log,
        subprocess.Popen(command, stderr=log, text=True, env=environment) as process,
    ):
        try:
            while not (match := re.search(r'"url": ?"([^"]+)"', Path(log.name).read_text())):
                if process.poll() is not None:
                    sys.exit(Path(log.name).read_text())
                # The resolution of `start_s`.
                time.sleep(0.002)
            url = match[1]
            httpx.get(f"{url}/readyz").raise_for_status()
            yield Server(url=url, process=process, start_s=time.perf_counter() - started)
        finally:
            process.terminate()
