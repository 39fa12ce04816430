"""A server and all processes that it starts: readiness, processor time, memory, and the end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from formats import Request

START_LIMIT_S = 120
END_LIMIT_S = 10
# A variable that all processes of a server inherit. It marks those that left their parent too.
MARK = "BENCH_SERVER"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class ServerError(Exception):
    """A server ended, or did not answer. The message is one line."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that has answered: its address, and the seconds until the first answer."""

    url: str
    cold_start_s: float
    pid: int
    mark: str

    def cpu_s(self) -> float:
        """User and system time of all processes of the server, and of those that it reaped."""
        total = 0
        for pid in processes_of(self.pid, self.mark):
            fields = stat_fields(pid)
            # utime, stime, cutime and cstime are fields 14 to 17 of proc(5).
            total += sum(map(int, fields[13:17])) if fields else 0
        return total / _TICKS_PER_S

    def memory_mb(self) -> float:
        """The proportional set size of all processes, MiB: shared pages count once in the sum."""
        total_kb = 0
        for pid in processes_of(self.pid, self.mark):
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:  # the process has ended
                continue
            total_kb += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total_kb / 1024


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback interface that are free now, all of them different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()


def stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat, the first at index 0; empty if the process has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    # The second field is the name in parentheses, which may hold blanks and parentheses itself.
    head, _, tail = text.rpartition(")")
    return [*head.split(" ", 1), *tail.split()]


def processes_of(root: int | None, mark: str) -> list[int]:
    """The live processes of a server: the descendants of `root`, and those with its mark.

    Some servers start daemons, which leave the tree and keep the mark. Others rename their
    processes, which overwrites the mark that /proc shows, and stay in the tree.
    """
    marked = f"{MARK}={mark}".encode()
    pids, parents = set(), {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        fields = stat_fields(pid)
        if not fields or fields[2] == "Z":
            continue
        parents[pid] = int(fields[3])
        try:
            if pid == root or marked in (entry / "environ").read_bytes().split(b"\0"):
                pids.add(pid)
        except OSError:  # it has ended, or belongs to another user
            continue
    # Each pass adds the children of the processes that are known.
    while children := {pid for pid, parent in parents.items() if parent in pids} - pids:
        pids |= children
    return sorted(pids)


def end_all(root: int | None, mark: str) -> None:
    """End all processes of a server: SIGTERM to the first one, and SIGKILL to what is left.

    Without a first one (`root` is None), all of them get SIGKILL.
    """
    remaining = processes_of(root, mark)
    if root in remaining:
        os.kill(root, signal.SIGTERM)
    deadline = time.monotonic() + END_LIMIT_S
    while remaining and time.monotonic() < deadline:
        # Children that the first process leaves behind are known from before it ended.
        time.sleep(0.02)
        remaining = sorted(
            {pid for pid in remaining if is_alive(pid)} | set(processes_of(root, mark))
        )
        if remaining and root not in remaining:
            break
    for pid in remaining:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    # The next server must not share the processor with one that is still ending.
    while any(map(is_alive, remaining)):
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Whether a process runs: neither gone nor a zombie."""
    fields = stat_fields(pid)
    return bool(fields) and fields[2] != "Z"


@contextmanager
def running(
    command: Sequence[str], *, port: int, first: Request, environment: Mapping[str, str]
) -> Iterator[Server]:
    """A server of `command` that listens on `port`, while the context is open.

    It has started when it answers `first` with 200. Raises ServerError if it ends before that, or
    does not answer within START_LIMIT_S.
    """
    url, mark = f"http://127.0.0.1:{port}", uuid.uuid4().hex
    process = None
    with (
        tempfile.NamedTemporaryFile() as log,
        httpx.Client(base_url=url, timeout=START_LIMIT_S) as client,
    ):
        try:
            started = time.perf_counter()
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment, MARK: mark},
                start_new_session=True,  # Ctrl-C reaches the bench alone, which ends its servers
            )
            status = "no connection"
            while True:
                if process.poll() is not None:
                    raise ServerError(f"it ended: {last_line(Path(log.name))}")
                if time.perf_counter() - started > START_LIMIT_S:
                    raise ServerError(
                        f"{status} for {START_LIMIT_S} s: {last_line(Path(log.name))}"
                    )
                try:
                    answer = client.post(
                        first.path, content=first.body, headers=dict(first.headers)
                    )
                except httpx.TransportError:  # it does not listen yet
                    answer = None
                if answer is not None:
                    status = f"status {answer.status_code}"
                    if answer.status_code == 200:
                        break
                time.sleep(0.005)  # the resolution of the cold start
            yield Server(
                url=url,
                cold_start_s=time.perf_counter() - started,
                pid=process.pid,
                mark=mark,
            )
        finally:
            # An interrupt may come before Popen returns. The mark is there already.
            end_all(process.pid if process else None, mark)
            if process:
                process.wait()


def last_line(log: Path) -> str:
    """The last line of a log that names an error, or else its last line; at most 300 characters.

    Some servers log their own shutdown after the error that caused it.
    """
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it wrote nothing"])[-1][:300]
