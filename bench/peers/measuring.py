"""One server in one round: cold start, load at each concurrency, and the bits under load."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from formats import Format, Request, Scores
from load import loading, measure, write_requests
from peers import SERVED, Launch, Peer, python_of_bench
from processes import Server, ServerError, free_ports, running
from workloads import Workload

WARM_UP_S = 1
# Ray keeps sockets below the scratch folder, whose paths may have at most 107 bytes.
SHORT_FOLDER = "/tmp"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long, how often and with how many connections the servers are measured."""

    concurrency: Sequence[int]
    seconds: int
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The figures of one server in one round, at one concurrency and in one format.

    Attributes:
        cpu_us: processor time of the server a request, user and system, microseconds.
        memory_mb: the proportional set size of all its processes after the load, MiB.
        compared, changed: answers under load whose bits were compared with those of the same
            request alone, and how many of them differed. They are of the highest concurrency.
        error: why there are no figures; one line, or empty.
        way: the threads and the batch of the ceiling.
    """

    peer: str
    workload: str
    format: str
    connections: int
    round: int
    per_s: float = 0.0
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    p99_ms: float = 0.0
    cpu_us: float = 0.0
    memory_mb: float = 0.0
    cold_start_s: float = 0.0
    errors: int = 0
    compared: int = 0
    changed: int = 0
    error: str = ""
    way: str = ""


class WrongAnswerError(ServerError):
    """A server answered with another shape, or with other scores than the first server."""


class RefusedError(ServerError):
    """A server answered with another status than 200, or closed the connection."""


def ask(client: httpx.Client, form: Format, request: Request) -> Scores:
    """The scores of one answer. Raises RefusedError and WrongAnswerError."""
    try:
        answer = client.post(request.path, content=request.body, headers=dict(request.headers))
    except httpx.TransportError as error:
        raise RefusedError(f"no answer from {request.path}: {error!r}") from error
    if answer.status_code != 200:
        raise RefusedError(f"status {answer.status_code} from {request.path}: {answer.text[:200]}")
    try:
        return form.scores(answer.headers, answer.content)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise WrongAnswerError(
            f"an answer of another shape ({error!r}): {answer.text[:200]}"
        ) from error


def count_changed(
    server: Server,
    form: Format,
    requests: Sequence[Request],
    alone: Sequence[Scores],
    *,
    requests_file: Path,
    connections: int,
    seconds: int,
) -> tuple[int, int]:
    """How many answers were compared under load, and how many had other bits than alone."""
    compared = changed = 0
    with (
        httpx.Client(base_url=server.url, timeout=60) as client,
        loading(server.url, requests_file, connections=connections, seconds=seconds) as load,
    ):
        while True:
            for request, expected in zip(requests, alone, strict=True):
                scores: Scores | None = None
                # An overloaded server may refuse a request: then there are no bits to compare.
                with contextlib.suppress(RefusedError):
                    scores = ask(client, form, request)
                # The answer counts if the load was there until after it.
                if load.poll() is not None:
                    return compared, changed
                if scores is not None:
                    compared += 1
                    changed += scores != expected


def measure_peer(
    peer: Peer,
    workload: Workload,
    plan: Plan,
    *,
    round_number: int,
    python: Path,
    references: dict[str, list[Scores]],
    progress: Callable[[str], None],
) -> list[Sample]:
    """The samples of one server in one round.

    `references` has the scores of the workload's items by the first server that answered. Raises
    ServerError.
    """
    samples = []
    with tempfile.TemporaryDirectory(prefix="bench", dir=SHORT_FOLDER) as name:
        scratch = Path(name)
        launch = Launch(
            python=python,
            workload=workload,
            ports=free_ports(3),
            scratch=scratch,
            cores=len(os.sched_getaffinity(0)),
        )
        forms = peer.formats[workload.name]
        variables = {
            "BENCH_MODEL": str(workload.folder),
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(SERVED), os.environ.get("PYTHONPATH", "")])
            ),
            **peer.variables(launch),
        }
        progress("start")
        with running(
            peer.command(launch),
            port=launch.ports[0],
            first=forms[0].request(workload.items[0]),
            environment=variables,
        ) as server:
            for form in forms:
                requests = [form.request(item) for item in workload.items]
                progress(f"{form.name}, alone")
                with httpx.Client(base_url=server.url, timeout=60) as client:
                    alone = [ask(client, form, request) for request in requests]
                reference = references.setdefault(workload.name, alone)
                for index, (scores, expected) in enumerate(zip(alone, reference, strict=True)):
                    if not scores.agrees_with(expected):
                        raise WrongAnswerError(
                            f"item {index} has {scores}, and the first server has {expected}"
                        )
                requests_file = scratch / f"{form.name}.requests"
                write_requests(requests_file, server.url, requests)
                most = max(plan.concurrency)
                measure(server.url, requests_file, connections=most, seconds=WARM_UP_S)
                for connections in plan.concurrency:
                    progress(f"{form.name}, {connections} connections")
                    samples.append(
                        measure_load(
                            server,
                            requests_file,
                            connections=connections,
                            seconds=plan.seconds,
                            labels={
                                "peer": peer.name,
                                "workload": workload.name,
                                "format": form.name,
                            },
                            round_number=round_number,
                        )
                    )
                progress(f"{form.name}, bits under load")
                compared, changed = count_changed(
                    server,
                    form,
                    requests,
                    alone,
                    requests_file=requests_file,
                    connections=most,
                    seconds=plan.seconds,
                )
                for index, sample in enumerate(samples):
                    if sample.format == form.name:
                        figures = {**vars(sample), "compared": compared, "changed": changed}
                        samples[index] = Sample(**figures)
    return samples


def measure_load(
    server: Server,
    requests_file: Path,
    *,
    connections: int,
    seconds: int,
    labels: Mapping[str, str],
    round_number: int,
) -> Sample:
    """The figures of one load."""
    cpu_before_s = server.cpu_s()
    load = measure(server.url, requests_file, connections=connections, seconds=seconds)
    cpu_s = server.cpu_s() - cpu_before_s
    if not load.requests:
        raise ServerError(f"no answer to {connections} connections in {seconds} s")
    return Sample(
        **labels,
        connections=connections,
        round=round_number,
        per_s=load.per_s,
        p50_ms=load.p50_ms,
        p95_ms=load.p95_ms,
        p99_ms=load.p99_ms,
        cpu_us=1e6 * cpu_s / load.requests,
        memory_mb=server.memory_mb(),
        cold_start_s=server.cold_start_s,
        errors=load.errors,
    )


def measure_ceiling(workload: Workload, plan: Plan, *, round_number: int) -> Sample:
    """ONNX Runtime on ready rows in a process of its own, with the best threads and batch."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(workload.items, file)
        file.flush()
        process = subprocess.run(
            [str(python_of_bench()), str(SERVED / "bare.py"), file.name, str(plan.seconds)],
            env={**os.environ, "BENCH_MODEL": str(workload.folder)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    figures = json.loads(process.stdout.splitlines()[-1])
    return Sample(
        peer="ceiling",
        workload=workload.name,
        format="-",
        connections=0,
        round=round_number,
        per_s=figures["rows_per_s"],
        cpu_us=figures["cpu_us"],
        p50_ms=figures["p50_ms"],
        p95_ms=figures["p95_ms"],
        p99_ms=figures["p99_ms"],
        way=figures["way"],
    )
