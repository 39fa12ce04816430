"""Why a worker probably ended, from its exit code and from the kernel's figures on memory."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

from evalmode.service.cpu_quota import cgroup_folders, read_or_empty

# The exit codes of a worker, besides 0 and those of the system. A worker that cannot start has sent
# the reason to its supervisor. A worker with a batch that is stuck for good ends itself.
REFUSED = 2
STUCK = 70

# A cgroup of version 1 without a limit reports the largest multiple of a page that fits 63 bits.
_UNLIMITED_BYTES = 1 << 60
_MEMORY_V2 = Path("sys/fs/cgroup")
_MEMORY_V1 = Path("sys/fs/cgroup/memory")

_SIGNALS = {
    signal.SIGSEGV: "native code (ONNX Runtime, or a library of its provider) crashed",
    signal.SIGBUS: "a file that was mapped became shorter, or the memory behind /dev/shm is full",
    signal.SIGABRT: "native code gave up, often because it got no memory",
    signal.SIGILL: "native code uses an instruction that this processor does not have",
    signal.SIGFPE: "native code divided by zero",
    signal.SIGTERM: "another process sent it while this one started",
    signal.SIGSYS: "a sandbox (seccomp) forbids a system call",
}
_CODES = {
    0: "another process asked it to end",
    1: "an error that nothing caught; its traceback is above",
    3: "the application did not start; the reason is above",
    REFUSED: "it refused to start",
    STUCK: "a batch was stuck for good",
}


def cause_of_death(
    exit_code: int, *, workers: int = 1, oom_kills: int = 0, root: Path = Path("/")
) -> str:
    """The probable cause, as one sentence, for an exit code of `subprocess` (a signal is negative).

    `oom_kills` is how many processes the kernel killed for lack of memory while this one ran.
    `root` is the folder that holds `proc` and `sys`.

    >>> cause_of_death(-signal.SIGFPE)
    'SIGFPE: native code divided by zero'
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
    """The bytes of memory that the cgroup of this process may use. None if it has no limit."""
    texts = _memory_files(root, version_2="memory.max", version_1="memory.limit_in_bytes")
    # Without a limit, version 2 says "max", and a missing file has no text.
    limits = [int(text) for text in texts if text.isdecimal()]
    lowest = min(limits, default=_UNLIMITED_BYTES)
    return lowest if lowest < _UNLIMITED_BYTES else None


def oom_kills(*, root: Path = Path("/")) -> int:
    """How many processes of this cgroup the kernel has killed for lack of memory so far."""
    for text in _memory_files(root, version_2="memory.events", version_1="memory.oom_control"):
        for line in text.splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill" and count.isdecimal():
                return int(count)
    return 0


def _memory_files(root: Path, *, version_2: str, version_1: str) -> Iterator[str]:
    """The texts of a file of the memory controller, from this process's cgroup up to the root's."""
    for folder in cgroup_folders(root, controller="", mount=_MEMORY_V2):
        yield read_or_empty(folder / version_2)
    for folder in cgroup_folders(root, controller="memory", mount=_MEMORY_V1):
        yield read_or_empty(folder / version_1)
