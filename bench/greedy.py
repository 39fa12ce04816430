"""Measures what greedy clients cost a server and its other clients.

    python bench/greedy.py BUNDLE

One client sends 300,000 requests and reads no answer. 400 sockets are idle at a server that may
open 256 files. The exit code is 1 if memory grows by 20 MB, or a health probe gets no answer.
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
MAX_GROWTH_MB = 20.0
REQUEST = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"


def connect(server: Server) -> socket.socket:
    """A connection to the server."""
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), timeout=10)


def probe_ms(server: Server) -> float:
    """The milliseconds until a new connection gets an answer of /livez, or infinity."""
    started = time.perf_counter()
    try:
        with connect(server) as connection:
            connection.sendall(REQUEST)
            if not connection.recv(65_536).startswith(b"HTTP/1.1 200 "):
                return float("inf")
    except OSError:
        return float("inf")
    return 1000 * (time.perf_counter() - started)


def probes_ms(server: Server) -> list[float]:
    """The milliseconds of the slowest and of the median of PROBES probes."""
    times = sorted(probe_ms(server) for _ in range(PROBES))
    return [times[-1], times[PROBES // 2]]


def flood(connection: socket.socket) -> int:
    """Send requests until all are sent or the server reads no more. Returns the bytes sent."""
    requests, sent_bytes = REQUEST * REQUESTS, 0
    connection.settimeout(1)
    try:
        while sent_bytes < len(requests):
            sent_bytes += connection.send(requests[sent_bytes : sent_bytes + 1_000_000])
    except OSError:
        pass
    return sent_bytes


@contextmanager
def open_files(limit: int) -> Iterator[None]:
    """Limit the open files of processes that start while the context is open."""
    previous = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, previous)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    bundle = parser.parse_args().bundle
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
        with connect(server) as connection:
            sent_bytes = flood(connection)
            times = probes_ms(server)
            growth_mb = server.resident_mb("VmHWM") - before_mb
            rows.append(
                (f"{sent_bytes / 1e6:.1f} MB of requests, answers unread", growth_mb, times)
            )
    with ExitStack() as sockets:
        with open_files(OPEN_FILES):
            server = sockets.enter_context(served(bundle, *flags))
        before_mb = server.resident_mb()
        for _ in range(IDLE):
            sockets.enter_context(connect(server))
        times = probes_ms(server)
        growth_mb = server.resident_mb("VmHWM") - before_mb
        rows.append((f"{IDLE} idle sockets, {OPEN_FILES} open files", growth_mb, times))
    for name, growth_mb, (slowest_ms, median_ms) in rows:
        failures += growth_mb >= MAX_GROWTH_MB or slowest_ms == float("inf")
        table.add_row(name, f"{growth_mb:.1f} MB", f"{slowest_ms:.1f} ms", f"{median_ms:.2f} ms")
    Console().print(table)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
