"""A child process that answers questions, within limits of time and memory.

Code that may abort, hang or take all memory runs in such a child, for example a stranger's model in
ONNX Runtime. When the child ends, one answer is lost, and the next question starts another child. A
child ends with its parent, in whatever way the parent ends.

Both ends speak over pipes. A question is its length and its bytes. The answer is any number of
messages, each a length and bytes, and then the length -1.
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
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_LENGTH = struct.Struct("<q")
_END = -1  # in place of a length: the answer has no more messages

_POLL_S = 0.05  # between two looks at the limits; a child can exceed them for this long
_KILL_TIMEOUT_S = 5.0
# How long to wait for the exit of a child that closed its pipe.
_EXIT_TIMEOUT_S = 10

_PIPE_BYTES = 1 << 16  # read or written at once; what a pipe holds on Linux
_STDERR_BYTES = 4096  # of the end of stderr
_REASON_CHARACTERS = 300  # of the last line of stderr, in a message


class ChildLost(Exception):  # noqa: N818 - read as a sentence: "raise ChildLost"
    """The child ended before it answered. The message continues a sentence: "ended with code 3"."""


class OutOfTime(ChildLost):
    """The answer took longer than its limit, so the child was ended."""


class OutOfMemory(ChildLost):
    """The child took more memory than its limit, and was ended."""


class Cancelled(ChildLost):
    """The answer is not needed any more, so the child was ended."""


@dataclass(frozen=True, kw_only=True)
class _Limits:
    deadline: float | None
    time_s: float | None
    memory_bytes: int | None
    cancelled: Callable[[], bool]

    def require(self, used_bytes: int) -> None:
        """Raise Cancelled, OutOfTime or OutOfMemory where a limit is exceeded."""
        if self.cancelled():
            raise Cancelled("was cancelled")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime(f"took longer than {self.time_s:g} s")
        if self.memory_bytes is not None and used_bytes > self.memory_bytes:
            raise OutOfMemory(f"took more than {self.memory_bytes >> 20:,} MiB of memory")


class Child:
    """One process, started by the first question and again after each question that ended it.

    `function` is what runs in it, as `package.module:function`; it must call `serve`. A child is
    for one thread at a time; only `kill` may be called from any thread.
    """

    def __init__(self, function: str) -> None:
        self._function = function
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None
        self._stderr_read = 0  # the bytes of stderr that `read_stderr` has passed
        self._lifeline = -1  # the end of a pipe that the end of this process closes

    @property
    def is_running(self) -> bool:
        """Whether the process that answered the last question is still there."""
        return self._process is not None and self._process.poll() is None

    @property
    def memory_bytes(self) -> int:
        """The private memory of the process, without mapped files; 0 where it is not known."""
        if self._process is None:
            return 0
        try:
            pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()
        except OSError:
            return 0
        if len(pages) < 3:  # the process has just ended
            return 0
        resident, shared = int(pages[1]), int(pages[2])
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")

    def start(self) -> None:
        """Start the process before the first question. Raises ChildLost if that is impossible."""
        if not self.is_running:
            self._start()

    def ask(
        self,
        question: bytes,
        *,
        time_s: float | None = None,
        memory_bytes: int | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[bytes]:
        """The messages of the answer, as they arrive. None is no limit.

        `cancelled` is called every 50 ms, and ends the child when it is true. Raises ChildLost when
        the child ends before its answer does. An answer that is not read to its end ends the child.
        """
        deadline = None if time_s is None else time.monotonic() + time_s
        limits = _Limits(
            deadline=deadline, time_s=time_s, memory_bytes=memory_bytes, cancelled=cancelled
        )
        is_complete = False
        try:
            self.start()
            self._write(_LENGTH.pack(len(question)) + question, limits)
            while (length := _LENGTH.unpack(self._read(_LENGTH.size, limits))[0]) != _END:
                yield self._read(length, limits)
            is_complete = True
        except (BrokenPipeError, EOFError):
            raise ChildLost(self._describe_end()) from None
        finally:
            # The rest of an answer would otherwise be read as the beginning of the next one.
            if not is_complete:
                self.close()

    def read_stderr(self) -> str:
        """What the child has written to stderr since the last call, or the end of it."""
        if self._stderr is None:
            return ""
        size = os.fstat(self._stderr.fileno()).st_size
        start = max(self._stderr_read, size - _STDERR_BYTES)
        self._stderr_read = size
        return os.pread(self._stderr.fileno(), _STDERR_BYTES, start).decode(errors="replace")

    def kill(self) -> None:
        """End the process from another thread: the one that reads the answer gets ChildLost."""
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """End the process; a later question starts another one."""
        process, self._process = self._process, None
        stderr, self._stderr = self._stderr, None
        if process is None or stderr is None:
            return
        process.kill()
        # A process that waits for a file system ends only when the file system answers.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_KILL_TIMEOUT_S)
        os.close(self._lifeline)
        assert process.stdin is not None
        assert process.stdout is not None
        for file in (process.stdin, process.stdout, stderr):
            file.close()

    def _start(self) -> None:
        self.close()
        # A file without a name, in memory where that exists: a container may have no folder that
        # can be written to.
        if hasattr(os, "memfd_create"):
            self._stderr = os.fdopen(os.memfd_create("stderr"), "w+b")
        else:
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self._stderr_read = 0
        lifeline, self._lifeline = os.pipe()
        module, _, name = self._function.partition(":")
        # Garbage collections take a tenth of the time of the imports, and find nothing to free.
        code = (
            f"import gc; gc.disable(); from {module} import {name}; gc.freeze(); gc.enable();"
            f" {name}()"
        )
        try:
            self._process = subprocess.Popen(
                # -P: a file named onnx.py in the working directory is not imported.
                [sys.executable, "-P", "-c", code, str(lifeline)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                bufsize=0,
                pass_fds=[lifeline],
                # Ctrl-C is for the parent, which then ends the child.
                process_group=0,
            )
        except OSError as error:
            os.close(self._lifeline)
            raise ChildLost(f"cannot be started: {error.strerror}") from error
        finally:
            os.close(lifeline)
        # A write would otherwise block in the kernel while the child hangs, beyond every limit.
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def _write(self, data: bytes, limits: _Limits) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        descriptor, rest = self._process.stdin.fileno(), memoryview(data)
        while rest:
            self._wait(descriptor, select.POLLOUT, limits)
            rest = rest[os.write(descriptor, rest[:_PIPE_BYTES]) :]

    def _read(self, count: int, limits: _Limits) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor, data = self._process.stdout.fileno(), bytearray()
        while len(data) < count:
            self._wait(descriptor, select.POLLIN, limits)
            part = os.read(descriptor, min(count - len(data), _PIPE_BYTES))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def _wait(self, descriptor: int, event: int, limits: _Limits) -> None:
        """Return as soon as the pipe is ready. Raises as `_Limits.require` does."""
        poll = select.poll()
        poll.register(descriptor, event)
        limits.require(self.memory_bytes)
        while not poll.poll(1000 * _POLL_S):
            limits.require(self.memory_bytes)

    def _describe_end(self) -> str:
        """How the process ended, with the last line that it wrote to stderr."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "closed its answers and went on"
        description = f"ended with code {code}"
        if code < 0:
            description = f"was ended by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            description += ", as the kernel does where memory runs out"
        for line in reversed(self.read_stderr().split("\n")):
            if line.strip():
                return f"{description}: {' '.join(line.split())[:_REASON_CHARACTERS]}"
        return description


def serve(answer: Callable[[bytes], Iterable[bytes]]) -> None:
    """Run the child: send what `answer` yields for each question, until there are no more.

    Other code in the child finds stdin empty, and what it prints on stdout goes to stderr: neither
    can disturb the questions and answers.
    """
    # The kernel ends this process when the parent's end of the pipe `lifeline` is closed. It sends
    # SIGIO, which ends the process even where the interpreter is deep in a library and runs no
    # Python.
    lifeline = int(sys.argv[1])
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # it is closed already
        sys.exit(1)

    questions = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    # An abort is expected here. A core file of each would fill the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Where memory runs out, the kernel ends the child first, and not its parent.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    while header := questions.read(_LENGTH.size):
        for message in answer(questions.read(*_LENGTH.unpack(header))):
            answers.write(_LENGTH.pack(len(message)) + message)
            answers.flush()
        answers.write(_LENGTH.pack(_END))
        answers.flush()


def bound_address_space(more_bytes: int) -> None:
    """In the child: refuse memory beyond what it has now and `more_bytes`. On Linux only."""
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
