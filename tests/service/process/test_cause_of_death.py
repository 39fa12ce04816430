"""The cause of a process's end, by its exit code and by made-up files of the kernel."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from evalmode.service.process.cause_of_death import cause_of_death, memory_limit, oom_kills


def files(root: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


VERSION_2 = {
    "proc/self/cgroup": "0::/pod/box\n",
    "sys/fs/cgroup/pod/box/memory.max": "max\n",
    "sys/fs/cgroup/pod/memory.max": "134217728\n",
    "sys/fs/cgroup/pod/box/memory.events": "low 0\nhigh 0\nmax 3\noom 2\noom_kill 7\n",
}
VERSION_1 = {
    "proc/self/cgroup": "3:memory:/box\n",
    "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "134217728\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/box/memory.oom_control": "oom_kill_disable 0\noom_kill 7\n",
}
WITHOUT = {
    "proc/self/cgroup": "0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
}


@pytest.mark.parametrize("texts", [VERSION_2, VERSION_1])
def test_a_kill_names_the_memory_limit_and_how_many_share_it(tmp_path, texts):
    root = files(tmp_path, texts)
    assert memory_limit(root=root) == 128 << 20
    assert oom_kills(root=root) == 7
    assert cause_of_death(-signal.SIGKILL, workers=4, root=root) == (
        "SIGKILL: memory ran out, most likely; the limit of this container (cgroup) is 128 MiB for"
        " 4 workers: raise it, or set fewer workers"
    )
    assert cause_of_death(-signal.SIGKILL, oom_kills=1, root=root) == (
        "SIGKILL: memory ran out; the limit of this container (cgroup) is 128 MiB: raise it, or"
        " set fewer workers"
    )


def test_without_a_limit_a_kill_may_have_another_cause(tmp_path):
    root = files(tmp_path, WITHOUT)
    assert memory_limit(root=root) is None
    assert oom_kills(root=root) == 0
    assert "or another process sent it" in cause_of_death(-signal.SIGKILL, root=root)


@pytest.mark.parametrize(
    ("exit_code", "cause"),
    [
        (-signal.SIGSEGV, "SIGSEGV: native code (ONNX Runtime, or a library of its provider)"),
        (-signal.SIGBUS, "SIGBUS: a file that was mapped became shorter"),
        (-signal.SIGUSR1, "SIGUSR1: another process sent it"),
        (-99, "signal 99"),
        (0, "another process asked it to end"),
        (2, "it refused to start"),
        (70, "a batch was stuck for good"),
        (127, "it ended with exit code 127"),
    ],
)
def test_every_exit_code_has_a_sentence(exit_code, cause):
    assert cause_of_death(exit_code).startswith(cause)
