"""A child answers within its limits. When it ends, one answer is lost; it ends with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evalmode.child_process import Cancelled, Child, ChildLost, OutOfMemory, OutOfTime

ANSWERS = """
import ctypes, os, sys, time
from evalmode.child_process import serve

def answer(question):
    word, _, rest = question.decode().partition(" ")
    print("asked for", word)
    yield word.encode()
    if word == "abort":
        print("an assertion failed", file=sys.stderr, flush=True)
        os.abort()
    if word == "exit":
        os._exit(3)
    if word == "sleep":
        time.sleep(600)
    if word == "spin":
        ctypes.PyDLL(None).sleep(600)  # and holds Python's lock
    if word == "memory":
        blocks = [bytearray(1 << 24) for _ in range(int(rest))]
        time.sleep(1)
    if word == "stdin":
        yield repr(sys.stdin.read()).encode()
    yield rest.encode()

def main():
    serve(answer)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    (tmp_path / "answers.py").write_text(ANSWERS)
    paths = [str(tmp_path), str(Path(__file__).parent.parent)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    child = Child("answers:main")
    yield child
    child.close()


def process_of(child: Child) -> subprocess.Popen[bytes]:
    assert child._process is not None
    return child._process


def test_one_process_answers_many_questions(child: Child) -> None:
    assert list(child.ask(b"say one")) == [b"say", b"one"]
    process = process_of(child)
    large = b"x" * 5_000_000  # more than a pipe holds
    assert list(child.ask(b"say " + large)) == [b"say", large]
    assert process_of(child) is process


def test_reading_stdin_and_printing_do_not_disturb_the_answers(child: Child) -> None:
    assert list(child.ask(b"stdin")) == [b"stdin", b"''", b""]
    assert list(child.ask(b"say two")) == [b"say", b"two"]


@pytest.mark.parametrize(
    ("question", "how"),
    [
        (b"abort", "was ended by SIGABRT: an assertion failed"),
        (b"exit", "ended with code 3"),
    ],
)
def test_the_error_says_how_a_child_ended_and_the_next_question_starts_another(
    question: bytes, how: str, child: Child
) -> None:
    messages = child.ask(question)
    assert next(messages) == question
    with pytest.raises(ChildLost) as caught:
        next(messages)
    assert str(caught.value).startswith(how)
    assert list(child.ask(b"say three")) == [b"say", b"three"]


@pytest.mark.parametrize("question", [b"sleep", b"spin"])
def test_a_child_that_takes_too_long_is_ended(question: bytes, child: Child) -> None:
    list(child.ask(b"say started"))
    process, started = process_of(child), time.monotonic()
    with pytest.raises(OutOfTime, match=r"^took longer than 0.3 s$"):
        list(child.ask(question, time_s=0.3))
    assert time.monotonic() - started < 5
    assert process.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="a child's memory is read from /proc")
def test_cancelling_an_answer_ends_the_child(child: Child) -> None:
    cancelled = threading.Event()
    messages = child.ask(b"spin", cancelled=cancelled.is_set)
    assert next(messages) == b"spin"
    process = process_of(child)
    cancelled.set()
    with pytest.raises(Cancelled):
        next(messages)
    assert process.returncode is not None
    assert [*child.ask(b"say again")] == [b"say", b"again"]


def test_a_child_that_takes_too_much_memory_is_ended(child: Child) -> None:
    assert list(child.ask(b"memory 1", memory_bytes=300 << 20)) == [b"memory", b"1"]
    with pytest.raises(OutOfMemory, match=r"^took more than 300 MiB of memory$"):
        list(child.ask(b"memory 40", memory_bytes=300 << 20))
    assert not child.is_running


def test_the_rest_of_an_unread_answer_is_not_read_as_the_next(child: Child) -> None:
    for _ in child.ask(b"say four"):
        break
    assert list(child.ask(b"say five")) == [b"say", b"five"]


@pytest.mark.skipif(sys.platform != "linux", reason="memfd_create exists on Linux only")
def test_a_child_needs_no_folder_that_can_be_written_to(
    child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/no-such-folder")
    assert [*child.ask(b"say it")] == [b"say", b"it"]
    assert "asked for say" in child.read_stderr()


def test_read_stderr_returns_each_line_once(child: Child) -> None:
    list(child.ask(b"say six"))
    assert child.read_stderr() == "asked for say\n"
    assert child.read_stderr() == ""
    list(child.ask(b"stdin"))
    assert child.read_stderr() == "asked for stdin\n"


PARENT = """
import sys
from evalmode.child_process import Child

child = Child("answers:main")
for message in child.ask(sys.argv[1].encode()):
    print(child._process.pid, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="by signals of Linux")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("question", ["sleep", "spin"])
@pytest.mark.usefixtures("child")  # writes answers.py
def test_a_child_ends_with_its_parent_however_the_parent_ends(
    how: signal.Signals, question: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", PARENT, question]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=tmp_path
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.send_signal(how)
        assert parent.wait(10) != 0
    end = time.monotonic() + 5
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    """Whether the process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
