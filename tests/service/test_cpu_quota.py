"""The CPUs that a process may use, by affinity and by the cgroup files of a container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evalmode.service.cpu_quota import cpu_quota

ALL_CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.fixture
def many_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of sixteen CPUs, so that the quota is the smaller number."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_without_a_quota_the_affinity_counts(tmp_path):
    assert cpu_quota(root=tmp_path) == ALL_CPUS


@pytest.mark.usefixtures("many_cpus")
@pytest.mark.parametrize(
    ("limit", "cpus"),
    [
        ("200000 100000\n", 2),
        ("150000 100000\n", 1),
        ("50000 100000\n", 1),
        ("max 100000\n", 16),
        ("", 16),
    ],
)
def test_a_version_2_quota_counts_whole_cpus_and_at_least_one(tmp_path, limit, cpus):
    root = tree(tmp_path, {"sys/fs/cgroup/cpu.max": limit, "proc/self/cgroup": "0::/\n"})
    assert cpu_quota(root=root) == cpus


@pytest.mark.usefixtures("many_cpus")
def test_a_quota_of_a_parent_cgroup_holds_too(tmp_path):
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod.slice/box.scope\n",
            "sys/fs/cgroup/pod.slice/cpu.max": "300000 100000",
            "sys/fs/cgroup/pod.slice/box.scope/cpu.max": "max 100000",
        },
    )
    assert cpu_quota(root=root) == 3


@pytest.mark.usefixtures("many_cpus")
def test_with_a_path_of_the_host_that_is_not_mounted_here_the_mounts_own_quota_holds(tmp_path):
    root = tree(
        tmp_path,
        {"proc/self/cgroup": "0::/../../docker/0f3c\n", "sys/fs/cgroup/cpu.max": "400000 100000"},
    )
    assert cpu_quota(root=root) == 4


@pytest.mark.usefixtures("many_cpus")
@pytest.mark.parametrize(("quota_us", "cpus"), [("250000", 2), ("-1", 16)])
def test_a_version_1_quota_is_read_where_its_controller_is_mounted(tmp_path, quota_us, cpus):
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "12:pids:/x\n4:cpu,cpuacct:/docker/0f3c\n1:name=systemd:/x\n",
            "sys/fs/cgroup/cpu/docker/0f3c/cpu.cfs_quota_us": quota_us,
            "sys/fs/cgroup/cpu/docker/0f3c/cpu.cfs_period_us": "100000",
        },
    )
    assert cpu_quota(root=root) == cpus
