"""Why a process probably ended, from its exit code and from what the kernel says of memory."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

from evalmode.service.batching.cpu_quota import cgroup_folders, read_or_empty
from evalmode.service.process.worker_codes import REFUSED, STUCK

# Version 1 writes the largest multiple of a page for "no limit".
_UNLIMITED_BYTES = 1 << 60
_MEMORY_V2 = Path("sys/fs/cgroup")
_MEMORY_V1 = Path("sys/fs/cgroup/memory")

_SIGNALS = {
    signal.SIGSEGV: "native code (ONNX Runtime, or a library of its provider) crashed",
    signal.SIGBUS: "a file that was mapped became shorter, or the memory behind /dev/shm is full",
    signal.SIGABRT: "native code gave up, often because it got no memory",
    signal.SIGILL: "native code uses an instruction that this processor does not have",
    signal.SIGFPE: "native code divided by zero",
    signal.SIGTERM: "it was told to end while it started, and not by this server",
    signal.SIGSYS: "a sandbox (seccomp) forbids a system call",
}
_CODES = {
    0: "it was told to end, and not by this server",
    1: "an error that nothing caught; its traceback is above",
    3: "the application did not start; the reason is above",
    REFUSED: "it refused to start",
    STUCK: "a batch was stuck for good",
}


def cause_of_death(
    exit_code: int, *, workers: int = 1, oom_kills: int = 0, root: Path = Path("/")
) -> str:
    """One sentence for an exit code as `subprocess` gives it: below 0 it is a signal.

    `oom_kills` is by how much the kernel's count of such kills grew while the process ran, and
    `root` is where `proc` and `sys` are looked for.
    """
    if exit_code >= 0:
        return _CODES.get(exit_code, f"it ended with exit code {exit_code}")
    try:
        number = signal.Signals(-exit_code)
    except ValueError:
        return f"signal {-exit_code}"
    if number != signal.SIGKILL:
        return f"{number.name}: {_SIGNALS.get(number, 'another process sent it')}"
    limit_bytes = memory_limit(root=root)
    certainty = "memory ran out" if oom_kills > 0 else "memory ran out, most likely"
    if limit_bytes is None:
        return (
            f"SIGKILL: {certainty}, or another process sent it: give the machine more memory, or"
            " fewer workers"
        )
    share = f" for {workers} workers" if workers > 1 else ""
    return (
        f"SIGKILL: {certainty}; the limit of this container (cgroup) is"
        f" {limit_bytes / (1 << 20):.0f} MiB{share}: raise it, or set fewer workers"
    )


def memory_limit(*, root: Path = Path("/")) -> int | None:
    """Bytes of memory that the cgroup of this process may use; None where it has no limit."""
    limits = [*_figures(root, "memory.max", "memory.limit_in_bytes")]
    least = min((int(text) for text in limits if text.isdecimal()), default=_UNLIMITED_BYTES)
    return least if least < _UNLIMITED_BYTES else None


def oom_kills(*, root: Path = Path("/")) -> int:
    """How many processes of this cgroup the kernel has killed for want of memory so far."""
    for text in _figures(root, "memory.events", "memory.oom_control"):
        for line in text.splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill" and count.isdecimal():
                return int(count)
    return 0


def _figures(root: Path, version_2: str, version_1: str) -> Iterator[str]:
    """The texts of a file of the memory controller, the cgroup's own first."""
    for folder in cgroup_folders(root, controller="", mount=_MEMORY_V2):
        yield read_or_empty(folder / version_2)
    for folder in cgroup_folders(root, controller="memory", mount=_MEMORY_V1):
        yield read_or_empty(folder / version_1)
