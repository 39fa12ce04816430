"""Measures where the processor time of a request goes, and loads that `bench/peers` does not send.

    python bench/request_cost.py bundles/languages/1

1. The processor time of one request, by parts. One process serves the bundle, and then four layers
   of 256, to 1 and to 64 connections. The time in ONNX Runtime is that of `/metrics`, and the time
   in the front end is measured in this process.
2. 100 texts a request, streams of lines, and 1,024 connections, with the default settings. The
   ceiling is that of `bench/peers`: bare ONNX Runtime with the best threads and batch.

It needs wrk, and is to run on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from evalmode.bundle.store import open_bundle

sys.path.insert(0, str(Path(__file__).with_name("peers")))

from formats import Format, Request, RowBinary, RowV2, TextJson
from load import measure, require_wrk, write_requests
from measuring import Plan, measure_ceiling
from peers import INFER, PREDICT
from processes import Server, free_ports, running
from workloads import Workload, rows_workload, text_workload

BUILD = Path(__file__).parents[1] / "build" / "peers"
EVALMODE = Path(sys.executable).with_name("evalmode")
ITEMS = 256
CONNECTIONS = (1, 64)
MANY_CONNECTIONS = 1_024
TEXTS_A_REQUEST = 100
LINES_A_STREAM = 2_000
RUN_SECONDS = re.compile(r"^evalmode_run_duration_seconds_sum\S* (\S+)$", re.MULTILINE)


@contextmanager
def served(workload: Workload, first: Request, *flags: str) -> Iterator[Server]:
    """A server of the workload's bundle, which has answered `first`."""
    [port] = free_ports(1)
    command = [str(EVALMODE), "serve", str(workload.folder), "--port", str(port), *flags]
    with running(command, port=port, first=first, environment={}) as server:
        yield server


def run_s(server: Server) -> float:
    """The seconds that all runs of ONNX Runtime have taken together."""
    return sum(map(float, RUN_SECONDS.findall(httpx.get(f"{server.url}/metrics").text)))


def front_end_us(workload: Workload) -> float:
    """The mean processor time from an item to its ids; 0 for rows of ids."""
    front_end = open_bundle(workload.folder).frontend()
    if front_end is None:
        return 0.0
    started = time.process_time()
    for item in workload.items:
        front_end.encode(item)
    return 1e6 * (time.process_time() - started) / len(workload.items)


def measure_parts(
    workload: Workload, form: Format, *, seconds: int, requests_file: Path, table: Table
) -> None:
    """A row of the table for each number of connections, of one process."""
    requests = [form.request(item) for item in workload.items]
    encode_us = front_end_us(workload)
    # One process of a server with one for each core.
    with served(workload, requests[0], "--workers", "1", "--parallel", "1") as server:
        write_requests(requests_file, server.url, requests)
        # The first request of each shape runs in a thread, and its time is learned.
        measure(server.url, requests_file, connections=max(CONNECTIONS), seconds=1)
        for connections in CONNECTIONS:
            cpu_before_s, run_before_s = server.cpu_s(), run_s(server)
            load = measure(server.url, requests_file, connections=connections, seconds=seconds)
            total_us = 1e6 * (server.cpu_s() - cpu_before_s) / load.requests
            runtime_us = 1e6 * (run_s(server) - run_before_s) / load.requests
            parts_us = (total_us, runtime_us, encode_us, total_us - runtime_us - encode_us)
            cells = [f"{part:,.0f}" for part in parts_us]
            table.add_row(f"{workload.name}, {form.name}", str(connections), *cells)


def measure_loads(workload: Workload, *, seconds: int, requests_file: Path, table: Table) -> None:
    """A row of the table for each load, with the default settings."""
    plan = Plan(concurrency=(), seconds=seconds, rounds=1)
    ceiling = measure_ceiling(workload, plan, round_number=0)
    table.add_row(f"ceiling: {ceiling.way}", "", f"{ceiling.per_s:,.0f}", "1.00", "", "", "")

    path, texts = PREDICT, list(workload.items)
    repeated = texts * (LINES_A_STREAM // len(texts) + 1)
    lines = "".join(f"{json.dumps(text)}\n" for text in repeated[:LINES_A_STREAM])
    single = [TextJson(path).request(text) for text in texts]
    many = [
        Request(path=path, body=json.dumps({"inputs": repeated[first:][:TEXTS_A_REQUEST]}).encode())
        for first in range(0, len(texts), TEXTS_A_REQUEST)
    ]
    stream = Request(
        path=path, body=lines.encode(), headers={"content-type": "application/x-ndjson"}
    )
    loads = (
        ("1 text a request", single, 1, 64),
        ("1 text a request", single, 1, MANY_CONNECTIONS),
        (f"{TEXTS_A_REQUEST} texts a request", many, TEXTS_A_REQUEST, 1),
        (f"{TEXTS_A_REQUEST} texts a request", many, TEXTS_A_REQUEST, 8),
        (f"streams of {LINES_A_STREAM:,} lines", [stream], LINES_A_STREAM, 1),
        (f"streams of {LINES_A_STREAM:,} lines", [stream], LINES_A_STREAM, 4),
    )
    with served(workload, single[0]) as server:
        for title, requests, texts_a_request, connections in loads:
            write_requests(requests_file, server.url, requests)
            load = measure(server.url, requests_file, connections=connections, seconds=seconds)
            answered = load.requests - load.errors
            texts_per_s = texts_a_request * answered / load.seconds
            table.add_row(
                title,
                f"{connections:,}",
                f"{texts_per_s:,.0f}",
                f"{texts_per_s / ceiling.per_s:.2f}",
                f"{load.p50_ms:,.1f}",
                f"{load.p99_ms:,.1f}",
                f"{load.errors:,} of {load.requests:,}",
            )


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="a bundle that classifies texts: NAME/VERSION")
    parser.add_argument("--seconds", type=int, default=5, help="of each load (default: 5)")
    arguments = parser.parse_args()
    require_wrk()
    console = Console(width=120)
    text = text_workload(arguments.bundle, count=ITEMS)
    with console.status("export four layers of 256, once"):
        rows = rows_workload(BUILD, count=ITEMS)

    parts = Table(title="processor time of a request, microseconds, one process")
    for column in ("request", "connections", "all", "ONNX Runtime", "front end", "the rest"):
        parts.add_column(column, justify="left" if column == "request" else "right")
    loads = Table(title="other loads, default settings")
    for column in ("load", "connections", "texts/s", "of the ceiling", "p50 ms", "p99 ms"):
        loads.add_column(column, justify="left" if column == "load" else "right")
    loads.add_column("refused", justify="right")

    with tempfile.TemporaryDirectory() as name, Progress(console=console, transient=True) as bar:
        requests_file = Path(name) / "requests"
        task = bar.add_task("processor time", total=4)
        infer = INFER.format("encoder")
        for workload, form in (
            (text, TextJson(PREDICT)),
            (rows, RowV2(infer)),
            (rows, RowBinary(infer)),
        ):
            measure_parts(
                workload, form, seconds=arguments.seconds, requests_file=requests_file, table=parts
            )
            bar.advance(task)
        bar.update(task, description="other loads")
        measure_loads(text, seconds=arguments.seconds, requests_file=requests_file, table=loads)
        bar.advance(task)
    console.print(parts)
    console.print(loads)


if __name__ == "__main__":
    main()
