"""A function in a process of its own, which answers questions within limits of time and memory.

Code that may abort, hang or take all memory (a stranger's model in ONNX Runtime) runs in such a
child. Its end costs one answer, and the next question starts another child. A child ends with its
parent, however the parent ends. Knows nothing of what is asked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

_LENGTH = struct.Struct("<q")  # before each message
_END = -1  # in place of a length: the answer has no more messages
_LOOK_S = 0.05  # between two looks at the child's memory
_LAST_S = 5.0  # how long a process that was killed is waited for
_PIECE = 1 << 16  # bytes that are read or written at once
_SAID = 4096  # bytes of stderr that are looked at
_LONGEST = 300  # characters of what a message repeats of it


class ChildLost(Exception):  # noqa: N818 - read as a sentence: "raise ChildLost"
    """The child ended, or was ended, before it answered; the message says how, after "it"."""


class OutOfTime(ChildLost):
    """The limit of time was met."""


class OutOfMemory(ChildLost):
    """The limit of memory was met."""


class Cancelled(ChildLost):
    """The answer is not wanted any more."""


class Child:
    """One process, started at the first question and again after each that ended it.

    `function` names what runs there, as `package.module:function`; it must call `serve`. Not for
    several threads at once; `kill` alone may be called from any thread.
    """

    def __init__(self, function: str) -> None:
        self._function = function
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None
        self._lifeline = -1  # the end of a pipe that only the end of this process closes
        self._heard = 0

    @property
    def is_running(self) -> bool:
        """Whether the process that answered the last question is still there."""
        return self._process is not None and self._process.poll() is None

    @property
    def memory_bytes(self) -> int:
        """The memory of the process that is its own and not a mapped file; 0 where it is not known.

        Linux tells it, other systems do not.
        """
        if self._process is None:
            return 0
        try:
            pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()
        except OSError:
            return 0
        if len(pages) < 3:
            return 0
        return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")

    def ask(
        self,
        question: bytes,
        *,
        time_s: float | None = None,
        memory_bytes: int | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[bytes]:
        """The messages of the answer, as they come; without limits where none are given.

        `cancelled` is called every 50 ms, and ends the child where it is true. Raises ChildLost
        where the child ends before its answer does.
        """
        end = None if time_s is None else time.monotonic() + time_s
        limits = _Limits(end=end, time_s=time_s, memory_bytes=memory_bytes, cancelled=cancelled)
        finished = False
        try:
            self._start()
            self._write(_LENGTH.pack(len(question)) + question, limits)
            while (length := _LENGTH.unpack(self._read(_LENGTH.size, limits))[0]) != _END:
                yield self._read(length, limits)
            finished = True
        except (BrokenPipeError, EOFError):
            raise ChildLost(self._end()) from None
        finally:
            if not finished:  # what is left of the answer would be taken for the next one
                self.close()

    def said(self) -> str:
        """What the child has written to stderr since this was asked last."""
        if self._stderr is None:
            return ""
        size = os.fstat(self._stderr.fileno()).st_size
        start = max(self._heard, size - _SAID)
        self._heard = size
        return os.pread(self._stderr.fileno(), _SAID, start).decode(errors="replace")

    def kill(self) -> None:
        """End the process from another thread: the one that waits for an answer gets ChildLost."""
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """End the process; a later question starts another one."""
        process, self._process = self._process, None
        stderr, self._stderr = self._stderr, None
        if process is None or stderr is None:
            return
        process.kill()
        # A process that waits for a file system that does not answer ends only when that does.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_LAST_S)
        os.close(self._lifeline)
        assert process.stdin is not None
        assert process.stdout is not None
        for file in (process.stdin, process.stdout, stderr):
            file.close()

    def _start(self) -> None:
        if self.is_running:
            return
        self.close()
        module, _, name = self._function.partition(":")
        self._stderr, self._heard = _open_anonymous_file(), 0
        lifeline, self._lifeline = os.pipe()
        # -P: a file named onnx.py in the working directory is not imported.
        code = f"from {module} import {name}; {name}()"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code, str(lifeline)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                bufsize=0,
                pass_fds=[lifeline],
                process_group=0,  # Ctrl-C is for the parent, which then ends the child
            )
        except OSError as error:
            os.close(self._lifeline)
            raise ChildLost(f"cannot be started: {error.strerror}") from error
        finally:
            os.close(lifeline)
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def _write(self, data: bytes, limits: _Limits) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        descriptor, rest = self._process.stdin.fileno(), memoryview(data)
        while rest:
            self._wait(descriptor, select.POLLOUT, limits)
            rest = rest[os.write(descriptor, rest[:_PIECE]) :]

    def _read(self, count: int, limits: _Limits) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor, data = self._process.stdout.fileno(), bytearray()
        while len(data) < count:
            self._wait(descriptor, select.POLLIN, limits)
            piece = os.read(descriptor, min(count - len(data), _PIECE))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def _wait(self, descriptor: int, event: int, limits: _Limits) -> None:
        """Return as soon as the pipe is ready. Raises OutOfTime or OutOfMemory at a limit, and
        Cancelled.
        """
        ready = select.poll()
        ready.register(descriptor, event)
        limits.check(self.memory_bytes)
        while not ready.poll(1000 * _LOOK_S):
            limits.check(self.memory_bytes)

    def _end(self) -> str:
        """How the process ended, with the last line that it wrote to stderr."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "closed its answers and went on"
        lines = self.said().split("\n")
        last = next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "")
        how = f"ended with code {code}"
        if code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += ", as the kernel does where memory runs out"
        return f"{how}: {last[:_LONGEST]}" if last else how


def _open_anonymous_file() -> IO[bytes]:
    """A file without a name, in memory where that exists: a container may let nobody write."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("stderr"), "w+b")
    return tempfile.TemporaryFile()


class _Limits:
    def __init__(
        self,
        *,
        end: float | None,
        time_s: float | None,
        memory_bytes: int | None,
        cancelled: Callable[[], bool],
    ) -> None:
        self._end, self._time_s, self._memory_bytes = end, time_s, memory_bytes
        self._cancelled = cancelled

    def check(self, memory_bytes: int) -> None:
        if self._cancelled():
            raise Cancelled("was cancelled")
        if self._end is not None and time.monotonic() > self._end:
            raise OutOfTime(f"took longer than {self._time_s:g} s")
        if self._memory_bytes is not None and memory_bytes > self._memory_bytes:
            raise OutOfMemory(f"took more than {self._memory_bytes >> 20:,} MiB of memory")


def serve(answer: Callable[[bytes], Iterable[bytes]]) -> None:
    """The child: send what `answer` yields for each question, until there are no more questions.

    What else reads stdin finds it empty, and what prints on stdout prints on stderr.
    """
    _end_with_the_parent(int(sys.argv[1]))
    questions = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # the child is the first to go where memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000")
    while header := questions.read(_LENGTH.size):
        for message in answer(questions.read(*_LENGTH.unpack(header))):
            answers.write(_LENGTH.pack(len(message)) + message)
            answers.flush()
        answers.write(_LENGTH.pack(_END))
        answers.flush()


def bound_address_space(more_bytes: int) -> None:
    """The child: refuse memory beyond what it has now and `more_bytes`, where Linux can tell."""
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _end_with_the_parent(lifeline: int) -> None:
    """Let the kernel end this process when the parent's end of the pipe is closed.

    It does so by SIGIO, also where the interpreter is deep in a library and runs no Python.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # it is closed already
        sys.exit(1)
