"""How many CPUs this process may use: the smallest of its affinity and its cgroup quotas.

A container with a quota of two CPUs sees all cores of its host. With a thread for each core the
kernel would throttle it most of the time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def cpu_quota(*, root: Path = Path("/")) -> int:
    """Whole CPUs, at least 1. `root` is the folder that holds `proc` and `sys`."""
    # macOS and Windows have no sched_getaffinity.
    if hasattr(os, "sched_getaffinity"):
        cpus = float(len(os.sched_getaffinity(0)))
    else:
        cpus = float(os.cpu_count() or 1)

    # Version 2: one file, "QUOTA PERIOD" in microseconds; without a limit QUOTA is "max".
    for folder in cgroup_folders(root, controller="", mount=Path("sys/fs/cgroup")):
        quota_us, _, period_us = read_or_empty(folder / "cpu.max").partition(" ")
        if quota_us.isdecimal() and period_us.strip().isdecimal():
            cpus = min(cpus, int(quota_us) / int(period_us))

    # Version 1: two files; without a limit the quota is "-1".
    for folder in cgroup_folders(root, controller="cpu", mount=Path("sys/fs/cgroup/cpu")):
        quota_us = read_or_empty(folder / "cpu.cfs_quota_us")
        period_us = read_or_empty(folder / "cpu.cfs_period_us")
        if quota_us.isdecimal() and period_us.isdecimal():
            cpus = min(cpus, int(quota_us) / int(period_us))

    return max(1, int(cpus))


def cgroup_folders(root: Path, *, controller: str, mount: Path) -> Iterator[Path]:
    """The cgroup folders whose limits hold for this process: its own, then those above it, and the
    mount last. In version 2 the controller is "".

    Inside a container /proc may show a path of the host that does not exist below the mount. Then
    only the mount exists, and it is the folder of the container.
    """
    path = ""
    # Each line is "ID:CONTROLLERS:PATH", for example "4:cpu,cpuacct:/docker/0f3c".
    for line in read_or_empty(root / "proc/self/cgroup").splitlines():
        _, controllers, cgroup_path = line.split(":", 2)
        if controller in controllers.split(","):
            path = cgroup_path.strip("/")
    folder = root / mount / path
    while folder != root / mount:
        yield folder
        folder = folder.parent
    yield root / mount


def read_or_empty(file: Path) -> str:
    """The text of a file without surrounding space; "" if it cannot be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
