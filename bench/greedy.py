"""What greedy clients cost a server and its other clients: `python bench/greedy.py BUNDLE`.

One client sends 300,000 requests and reads no answer; 400 sockets lie idle at a server with 256
open files. Exit code 1 when memory grows by 20 MB or a probe of health is not answered. Talks HTTP
only.
"""

from __future__ import annotations

import argparse
import resource
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

from launched import Server, served
from rich.console import Console
from rich.table import Table

REQUESTS = 300_000
PROBES = 200
IDLE = 400
OPEN_FILES = 256
MOST_MB = 20.0
REQUEST = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"


def connected(server: Server) -> socket.socket:
    """A connection to the server."""
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), timeout=10)


def probe_ms(server: Server) -> float:
    """Milliseconds until a new connection has the answer of /livez; infinite where it has none."""
    started = time.perf_counter()
    try:
        with connected(server) as connection:
            connection.sendall(REQUEST)
            if not connection.recv(65_536).startswith(b"HTTP/1.1 200 "):
                return float("inf")
    except OSError:
        return float("inf")
    return 1000 * (time.perf_counter() - started)


def probes_ms(server: Server) -> list[float]:
    """The slowest and the median of many probes."""
    times = sorted(probe_ms(server) for _ in range(PROBES))
    return [times[-1], times[PROBES // 2]]


def flood(connection: socket.socket) -> int:
    """Send the requests until all are sent or the server takes no more; the bytes sent."""
    requests, sent = REQUEST * REQUESTS, 0
    connection.settimeout(1)
    try:
        while sent < len(requests):
            sent += connection.send(requests[sent : sent + 1_000_000])
    except OSError:
        pass
    return sent


@contextmanager
def open_files(limit: int) -> Iterator[None]:
    """Processes that start within the block may have so many files open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def main() -> int:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("bundle")
    bundle = options.parse_args().bundle
    table = Table(
        "",
        "memory grows by",
        "slowest probe",
        "median",
        title="greedy clients",
        title_justify="left",
    )
    failures = 0
    flags = ("--access-log", "0", "--drain-s", "0")
    with served(bundle, *flags) as server:
        rows = [("alone", 0.0, probes_ms(server))]
        before_mb = server.resident_mb()
        with connected(server) as connection:
            sent = flood(connection)
            times = probes_ms(server)
            grown_mb = server.resident_mb("VmHWM") - before_mb
            rows.append((f"{sent / 1e6:.1f} MB of requests, answers unread", grown_mb, times))
    with ExitStack() as sockets:
        with open_files(OPEN_FILES):
            server = sockets.enter_context(served(bundle, *flags))
        before_mb = server.resident_mb()
        for _ in range(IDLE):
            sockets.enter_context(connected(server))
        times = probes_ms(server)
        grown_mb = server.resident_mb("VmHWM") - before_mb
        rows.append((f"{IDLE} idle sockets, {OPEN_FILES} open files", grown_mb, times))
    for name, grown_mb, (slowest_ms, median_ms) in rows:
        failures += grown_mb >= MOST_MB or slowest_ms == float("inf")
        table.add_row(name, f"{grown_mb:.1f} MB", f"{slowest_ms:.1f} ms", f"{median_ms:.2f} ms")
    Console().print(table)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
