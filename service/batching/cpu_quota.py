"""How many CPUs this process may use: the least of affinity and cgroup quota.

A container with a quota of two CPUs sees all the host's cores; a thread for each would be throttled
to a crawl.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def cpu_quota(*, root: Path = Path("/")) -> int:
    """Whole CPUs, at least 1. `root` is where `proc` and `sys` are looked for."""
    quotas = [*_version_2(root), *_version_1(root)]
    return max(1, int(min([_affinity(), *quotas])))


def _affinity() -> float:
    if hasattr(os, "sched_getaffinity"):
        return float(len(os.sched_getaffinity(0)))
    return float(os.cpu_count() or 1)


def _version_2(root: Path) -> Iterator[float]:
    """The quota of this cgroup and of every one above it, in CPUs: each of them binds."""
    for folder in cgroup_folders(root, controller="", mount=Path("sys/fs/cgroup")):
        limit, _, period_us = read_or_empty(folder / "cpu.max").partition(" ")
        if limit.isdecimal() and period_us.strip().isdecimal():
            yield int(limit) / int(period_us)


def _version_1(root: Path) -> Iterator[float]:
    for folder in cgroup_folders(root, controller="cpu", mount=Path("sys/fs/cgroup/cpu")):
        quota_us, period_us = (
            read_or_empty(folder / "cpu.cfs_quota_us"),
            read_or_empty(folder / "cpu.cfs_period_us"),
        )
        if quota_us.isdecimal() and period_us.isdecimal():  # "-1": no limit
            yield int(quota_us) / int(period_us)


def cgroup_folders(root: Path, *, controller: str, mount: Path) -> Iterator[Path]:
    """The cgroup folders of a controller that bind this process, the mount's own last. In version 2
    the controller is "".

    Inside a container the path that /proc shows may be the host's and not exist under the mount;
    the mount's own folder is the container's then.
    """
    inside = ""
    for line in read_or_empty(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            inside = path.strip("/")
    folder = root / mount / inside
    while folder != root / mount:
        yield folder
        folder = folder.parent
    yield root / mount


def read_or_empty(file: Path) -> str:
    """The text of a file, "" where it cannot be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
