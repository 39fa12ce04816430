"""Several server processes on one port: starts them, replaces those that end, and ends them. Serves
nothing itself.

A worker that ends is replaced at once, one that ends again and again before it was ready ever
later. After five times in a row, where no other worker serves, the supervisor gives up. The socket
is bound and kept here, so what waits to be accepted when a worker ends is taken by the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from prometheus_client.multiprocess import mark_process_dead
from pydantic import SecretStr

from evalmode.service.errors import StartFailed, WorkersFailed
from evalmode.service.process.cause_of_death import cause_of_death, oom_kills
from evalmode.service.process.signals import Signals
from evalmode.service.settings import METRICS_FOLDER_VARIABLE, Settings

_log = structlog.get_logger("evalmode.service")

_LONGEST_BACKOFF_S = 5.0
_FIRST_BACKOFF_S = 0.1
# Beyond what a worker takes for its own end, which it bounds itself.
_ENDING_S = 15.0
# A worker that starts has nothing to answer.
_STARTING_ENDING_S = 5.0
_MOST_QUICK_DEATHS = 5
_LONGEST_LINE_BYTES = 1 << 20


@dataclass(eq=False, kw_only=True)
class _Worker:
    """A process, and its state as far as the supervisor knows it."""

    process: asyncio.subprocess.Process
    writer: asyncio.StreamWriter
    lines: asyncio.StreamReader
    oom_kills: int  # of the cgroup when it was started
    ready: bool = False
    was_ready: bool = False
    refused: str | None = None

    def signal(self, number: int) -> None:
        """Send it a signal, if it is there to take one; while it starts, the one that ends it
        without a word.
        """
        # Not by `send_signal`, which looks first whether the process has ended, and takes the exit
        # code from asyncio.
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number if self.was_ready else signal.SIGTERM)


class Supervisor:
    """Keeps `settings.workers` processes of `command` serving on a bound socket."""

    def __init__(
        self, settings: Settings, listener: socket.socket, *, command: Sequence[str]
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._command = command
        self._workers: set[_Worker] = set()
        self._served = False
        self._signal: int | None = None

    def run(self, signals: Signals, *, serving: Callable[[Mapping[str, object]], None]) -> None:
        """Serve until a signal, and until every worker has ended.

        `serving` is called once, when all workers are ready first, with what one of them tells of
        its models. Raises StartFailed with the sentence of a worker that refuses to start before
        that, and WorkersFailed when workers end again and again before they are ready.
        """
        with metrics_folder(self._settings) as self._folder:
            asyncio.run(self._run(signals, serving))

    async def _run(self, signals: Signals, serving: Callable[[Mapping[str, object]], None]) -> None:
        loop = asyncio.get_running_loop()
        self._serving = serving
        self._stopping = asyncio.Event()
        signals.to(lambda number: loop.call_soon_threadsafe(self._signalled, number))
        failure: StartFailed | WorkersFailed | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._settings.workers):
                    group.create_task(self._keep())
        except* (StartFailed, WorkersFailed) as group_error:
            first = group_error.exceptions[0]
            assert isinstance(first, StartFailed | WorkersFailed)
            failure = first
        if failure is not None:
            self._signalled(signal.SIGINT)
            await asyncio.gather(*(worker.process.wait() for worker in self._workers))
            raise failure

    async def _keep(self) -> None:
        """Keep one worker serving."""
        quick_deaths = 0
        while self._signal is None:
            try:
                worker = await self._start()
            except OSError as error:
                cause = f"it cannot be started: {error.strerror or error}"
                _log.error("a worker cannot be started", error=str(error))
                quick_deaths += 1
            else:
                cause = await self._attend(worker)
                quick_deaths = 0 if worker.was_ready else quick_deaths + 1
            if not quick_deaths or self._signal is not None:
                continue
            others_serve = self._served and any(other.was_ready for other in self._workers)
            if quick_deaths >= _MOST_QUICK_DEATHS and not others_serve:
                raise WorkersFailed(
                    f"a worker ended {quick_deaths} times in a row before it was ready, the last"
                    f" time because of this: {cause}"
                )
            backoff_s = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2**quick_deaths)
            _log.error(
                "waiting before the next start of a worker",
                failures=quick_deaths,
                backoff_s=backoff_s,
            )
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff_s)

    async def _start(self) -> _Worker:
        oom_kills_before = oom_kills()
        ours, theirs = socket.socketpair()
        with theirs:
            descriptors = (self._listener.fileno(), theirs.fileno())
            process = await asyncio.create_subprocess_exec(
                *self._command,
                *map(str, descriptors),
                pass_fds=descriptors,
                env=self._environment(),
                stdin=asyncio.subprocess.DEVNULL,
                process_group=0,  # the terminal's interrupt comes to us, and from us to them: once
            )
        lines, writer = await asyncio.open_connection(sock=ours, limit=_LONGEST_LINE_BYTES)
        worker = _Worker(process=process, lines=lines, writer=writer, oom_kills=oom_kills_before)
        self._workers.add(worker)
        writer.write(settings_as_json(self._settings).encode() + b"\n")
        if self._signal is not None:
            worker.signal(self._signal)
        return worker

    async def _attend(self, worker: _Worker) -> str:
        """Hear what a worker tells, until it has ended; why it probably did."""
        with contextlib.suppress(ConnectionError):
            while line := await worker.lines.readline():
                self._hear(worker, json.loads(line))
        code = await worker.process.wait()
        self._workers.remove(worker)
        worker.writer.close()
        if self._folder is not None:
            mark_process_dead(worker.process.pid, self._folder)  # type: ignore[no-untyped-call]
        self._tell()
        cause = worker.refused or cause_of_death(
            code, workers=self._settings.workers, oom_kills=oom_kills() - worker.oom_kills
        )
        if self._signal is not None:
            return cause
        if worker.refused is not None and not self._served:
            raise StartFailed(worker.refused)
        _log.error("a worker ended", worker=worker.process.pid, exit_code=code, reason=cause)
        return cause

    def _hear(self, worker: _Worker, said: Mapping[str, Any]) -> None:
        if "refused" in said:
            worker.refused = said["refused"]
            return
        worker.ready = said["ready"]
        if not worker.was_ready:
            worker.was_ready = True
            self._greet(worker, said["told"])
        elif worker.ready:
            _log.info("a worker is ready again", worker=worker.process.pid)
        elif self._signal is None:
            _log.warning("a worker is not ready", worker=worker.process.pid, reason=said["why"])
        self._tell()

    def _greet(self, worker: _Worker, told: Mapping[str, object]) -> None:
        if self._served:
            _log.info("a worker serves", worker=worker.process.pid)
        elif sum(other.was_ready for other in self._workers) == self._settings.workers:
            self._served = True
            self._serving({**told, "workers": self._settings.workers})

    def _tell(self) -> None:
        """Tell each worker how many others take requests."""
        ready = sum(worker.ready for worker in self._workers)
        for worker in self._workers:
            worker.writer.write(json.dumps({"others": ready - worker.ready}).encode() + b"\n")

    def _signalled(self, number: int) -> None:
        if self._signal is None:
            # Otherwise connections that come after the last worker has stopped listening would wait
            # here for ever.
            self._listener.close()
            limit_s = self._settings.drain_s + self._settings.grace_s + _ENDING_S
            loop = asyncio.get_running_loop()
            loop.call_later(limit_s, self._kill)
            loop.call_later(_STARTING_ENDING_S, self._kill, True)
        self._signal = number
        self._stopping.set()
        for worker in self._workers:
            worker.signal(number)

    def _kill(self, only_starting: bool = False) -> None:
        for worker in self._workers:
            if only_starting and worker.was_ready:
                continue
            _log.error("a worker does not end: killed", worker=worker.process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process.pid, signal.SIGKILL)

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        environment.pop(METRICS_FOLDER_VARIABLE, None)
        if self._folder is not None:
            environment[METRICS_FOLDER_VARIABLE] = self._folder
        return environment


def settings_as_json(settings: Settings) -> str:
    """The settings whole, secrets included, on one line."""
    plain = settings.model_dump(mode="json")
    for name in plain:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            plain[name] = value.get_secret_value()
    return json.dumps(plain)


@contextlib.contextmanager
def metrics_folder(settings: Settings, *, memory: str = "/dev/shm") -> Iterator[str | None]:
    """Where the workers' figures meet: a folder in memory where there is one; None where nobody
    asks for figures.

    Raises StartFailed where nothing can be written.
    """
    if not settings.metrics:
        yield None
        return
    place = memory if os.access(memory, os.W_OK) else None
    try:
        kept = tempfile.TemporaryDirectory(
            prefix="evalmode-metrics-", dir=place, ignore_cleanup_errors=True
        )
    except OSError as error:
        raise StartFailed(
            f"the figures of several workers need a folder: make {memory} or TMPDIR writable, or"
            f" set metrics to false (--no-metrics): {error.strerror or error}"
        ) from error
    with kept as folder:
        yield folder
