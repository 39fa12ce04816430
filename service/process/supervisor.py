"""Several server processes (workers) on one port: starts them, replaces them, and ends them.

The supervisor binds the socket and keeps it open. So connections that wait in the kernel when a
worker ends are accepted by the others. When a worker ends, these decisions follow, in order:

1. The server is stopping: nothing is started.
2. The worker refused to start, and the server has not served yet: the server refuses to start.
3. The worker was ready: it is replaced at once.
4. It ended before it was ready, `_MAX_QUICK_DEATHS` times in a row, and no other worker serves:
   the server ends.
5. It ended before it was ready: it is replaced after a time that doubles with each such death.

The module `worker` documents the messages between supervisor and workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import SecretStr

from evalmode.service.all_processes import FigureKind
from evalmode.service.errors import StartFailed, WorkersFailed
from evalmode.service.process.cause_of_death import cause_of_death, oom_kills
from evalmode.service.process.signals import Signals
from evalmode.service.settings import Settings
from evalmode.service.telemetry import structlog
from evalmode.service.telemetry.figures import add_families, lasting_families
from evalmode.service.telemetry.statistics import add_records

_log = structlog.get_logger("evalmode.service")

_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 5.0
_MAX_QUICK_DEATHS = 5
# How long a worker may take to end beyond `drain_s` and `grace_s`. A worker limits its own end to
# less; this is for one that cannot.
_ENDING_S = 15.0
# The same for a worker that is still starting: it has nothing to answer.
_STARTING_ENDING_S = 5.0
# More than any message of a worker, which are the statistics of 1,000 model versions: 5 MB.
# asyncio's default is 64 KiB.
_LONGEST_LINE_BYTES = 1 << 26
# The longest wait for the figures of a worker. Later its last known ones count.
_FIGURES_S = 1.0
# How often the figures of all workers are read. What a killed worker counted since is lost.
_READING_S = 5.0
# How the figures of several workers become one.
_ADD: Mapping[FigureKind, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = {
    "statistics": add_records,
    "metrics": add_families,
}


@dataclass(eq=False, kw_only=True)
class _Worker:
    """A worker process, as the supervisor knows it.

    `oom_kills_before` is the result of `oom_kills` when it started. `refusal` is the sentence of a
    worker that cannot start. `figures` are those that were read last.
    """

    process: asyncio.subprocess.Process
    writer: asyncio.StreamWriter
    lines: asyncio.StreamReader
    oom_kills_before: int
    is_ready: bool = False
    was_ready: bool = False
    refusal: str | None = None
    figures: dict[FigureKind, list[dict[str, Any]]] = field(
        default_factory=lambda: {kind: [] for kind in _ADD}
    )

    def send(self, **message: object) -> None:
        """Send a message. One to a worker that has ended is lost."""
        self.writer.write(json.dumps(message).encode() + b"\n")

    def signal(self, number: int) -> None:
        """Send a signal, unless the process has ended.

        A worker that is still starting gets SIGTERM, which ends it at once.
        """
        # Not `send_signal`: Popen polls the process first (Python 3.11), and that would take the
        # exit code away from asyncio.
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number if self.was_ready else signal.SIGTERM)


@dataclass(eq=False, kw_only=True)
class _Call:
    """A call of a function in several workers. It ends when it waits for no more of them.

    `results` are the results that were sent, in the order of arrival.
    """

    number: int
    name: str
    arguments: Sequence[object]
    waits_for: set[_Worker] = field(default_factory=set)
    results: dict[_Worker, Mapping[str, Any]] = field(default_factory=dict)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def send_to(self, worker: _Worker) -> None:
        """Call the function in this worker too."""
        self.waits_for.add(worker)
        worker.send(call=self.number, name=self.name, arguments=self.arguments)

    def wait_no_longer_for(self, worker: _Worker) -> None:
        """The worker has sent its result, or has ended."""
        self.waits_for.discard(worker)
        if not self.waits_for:
            self.ended.set()


class Supervisor:
    """Keeps `settings.workers` processes of `command` serving on a bound socket."""

    def __init__(
        self, settings: Settings, listener: socket.socket, *, command: Sequence[str]
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._command = command
        self._workers: set[_Worker] = set()
        self._has_served = False
        self._signal: int | None = None
        self._shared_folder: str | None = None
        self._on_serving: Callable[[Mapping[str, object]], None] = lambda log_fields: None
        self._stopping = asyncio.Event()
        # The calls that were passed on and have not ended, and among them the load or unload.
        self._call_numbers = itertools.count()
        self._calls: dict[int, _Call] = {}
        self._change: _Call | None = None
        self._changing = asyncio.Lock()
        self._answering: set[asyncio.Task[None]] = set()
        # The models that were unloaded by request, and the figures of workers that have ended.
        self._unloaded: set[str] = set()
        self._ended_figures: dict[FigureKind, list[dict[str, Any]]] = {kind: [] for kind in _ADD}

    def run(self, signals: Signals, *, on_serving: Callable[[Mapping[str, object]], None]) -> None:
        """Serve until a signal, and until every worker has ended.

        `on_serving` is called once, when all workers are ready for the first time, with the log
        fields of one of them. Raises StartFailed with the sentence of a worker that refuses to
        start before that, and WorkersFailed if workers keep ending before they are ready.
        """
        self._on_serving = on_serving
        with _shared_folder() as self._shared_folder:
            asyncio.run(self._run(signals))

    async def _run(self, signals: Signals) -> None:
        loop = asyncio.get_running_loop()
        signals.send_to(lambda number: loop.call_soon_threadsafe(self._stop, number))
        # Outside of the group, which would wait for it.
        reading = asyncio.create_task(self._read_figures_until_stopping())
        failure: StartFailed | WorkersFailed | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._settings.workers):
                    group.create_task(self._keep_worker())
        except* (StartFailed, WorkersFailed) as group_error:
            first = group_error.exceptions[0]
            assert isinstance(first, StartFailed | WorkersFailed)
            failure = first
        if failure is not None:
            self._stop(signal.SIGINT)
            await asyncio.gather(*(worker.process.wait() for worker in self._workers))
            raise failure
        reading.cancel()

    async def _keep_worker(self) -> None:
        """Keep one worker running until the server stops. The module's docstring has the rules."""
        quick_deaths = 0
        while self._signal is None:
            try:
                worker = await self._start_worker()
            except OSError as error:
                cause = f"it cannot be started: {error.strerror or error}"
                _log.error("a worker cannot be started", error=str(error))
                quick_deaths += 1
            else:
                cause = await self._follow(worker)
                if worker.was_ready:
                    quick_deaths = 0
                else:
                    quick_deaths += 1
            if quick_deaths == 0 or self._signal is not None:
                continue

            others_serve = self._has_served and any(other.was_ready for other in self._workers)
            if quick_deaths >= _MAX_QUICK_DEATHS and not others_serve:
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

    async def _start_worker(self) -> _Worker:
        oom_kills_before = oom_kills()
        channel, worker_channel = socket.socketpair()
        with worker_channel:
            descriptors = (self._listener.fileno(), worker_channel.fileno())
            process = await asyncio.create_subprocess_exec(
                *self._command,
                *map(str, descriptors),
                pass_fds=descriptors,
                stdin=asyncio.subprocess.DEVNULL,
                # A group for the worker alone. Otherwise an interrupt at the terminal would reach
                # it twice: from the terminal, and from the supervisor.
                process_group=0,
            )
        lines, writer = await asyncio.open_connection(sock=channel, limit=_LONGEST_LINE_BYTES)
        worker = _Worker(
            process=process, lines=lines, writer=writer, oom_kills_before=oom_kills_before
        )
        self._workers.add(worker)
        # Through the socket, because every user can read command lines, and child processes of the
        # worker would inherit its environment.
        writer.write(settings_as_json(self._settings).encode() + b"\n")
        worker.send(unloaded=sorted(self._unloaded), shared_folder=self._shared_folder)
        if self._change is not None:
            self._change.send_to(worker)
        if self._signal is not None:
            worker.signal(self._signal)
        return worker

    async def _follow(self, worker: _Worker) -> str:
        """Handle the messages of a worker until it ends. Returns the probable cause of its end."""
        with contextlib.suppress(ConnectionError):
            while line := await worker.lines.readline():
                self._handle_message(worker, json.loads(line))
        exit_code = await worker.process.wait()
        self._workers.remove(worker)
        worker.writer.close()
        for call in self._calls.values():
            call.wait_no_longer_for(worker)
        for kind, figures in worker.figures.items():
            lasting = lasting_families(figures) if kind == "metrics" else figures
            self._ended_figures[kind] = _ADD[kind]([*self._ended_figures[kind], *lasting])
        self._send_ready_counts()

        cause = worker.refusal or cause_of_death(
            exit_code,
            workers=self._settings.workers,
            oom_kills=oom_kills() - worker.oom_kills_before,
        )
        if self._signal is not None:
            return cause
        if worker.refusal is not None and not self._has_served:
            raise StartFailed(worker.refusal)
        _log.error("a worker ended", worker=worker.process.pid, exit_code=exit_code, reason=cause)
        return cause

    def _handle_message(self, worker: _Worker, message: Mapping[str, Any]) -> None:
        if "refused" in message:
            worker.refusal = message["refused"]
            return
        if "call" in message:
            task = asyncio.create_task(self._answer_call(worker, message))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
            return
        if "result" in message:
            self._handle_result(worker, message)
            return
        worker.is_ready = message["ready"]
        if not worker.was_ready:
            worker.was_ready = True
            ready_count = sum(other.was_ready for other in self._workers)
            if self._has_served:
                _log.info("a worker serves", worker=worker.process.pid)
            elif ready_count == self._settings.workers:
                self._has_served = True
                self._on_serving({**message["log_fields"], "workers": self._settings.workers})
        elif worker.is_ready:
            _log.info("a worker is ready again", worker=worker.process.pid)
        elif self._signal is None:
            _log.warning(
                "a worker is not ready", worker=worker.process.pid, reason=message["reason"]
            )
        self._send_ready_counts()

    def _send_ready_counts(self) -> None:
        """Tell each worker how many others are ready."""
        ready_count = sum(worker.is_ready for worker in self._workers)
        for worker in self._workers:
            worker.send(others=ready_count - worker.is_ready)

    async def _answer_call(self, caller: _Worker, message: Mapping[str, Any]) -> None:
        """Pass the call of a worker on to every worker, and send it the result of all."""
        name, arguments = message["name"], message["arguments"]
        result: Mapping[str, object]
        if name in _ADD:
            result = {"value": await self._figures(name)}
        else:
            async with self._changing:
                result = await self._change_models(caller, name, *arguments)
        caller.send(result=message["call"], **result)

    async def _change_models(self, caller: _Worker, name: str, model: str) -> Mapping[str, object]:
        """Load or unload a model in every worker. The result is the first error, if there is one.

        A worker that starts meanwhile is called too. A worker that ends meanwhile has no result.
        """
        with self._calling(self._workers, name, model) as call:
            self._change = call
            await call.ended.wait()
            self._change = None

        # Otherwise no worker knows the model, and nothing has changed.
        if any(result.get("error") != "UnknownModel" for result in call.results.values()):
            if name == "load":
                self._unloaded.discard(model)
            else:
                self._unloaded.add(model)
        for worker, result in call.results.items():
            # The others may have stopped already, and then they open no model.
            is_stopping = self._signal is not None and worker is not caller
            if "error" in result and not is_stopping:
                return {"error": result["error"], "sentence": result["sentence"]}
        return {"value": None}

    async def _figures(self, kind: FigureKind) -> list[dict[str, Any]]:
        """The figures of all workers, added up, with those of workers that have ended."""
        ready_workers = [worker for worker in self._workers if worker.was_ready]
        with self._calling(ready_workers, kind) as call, contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIGURES_S):
                await call.ended.wait()
        figures = list(self._ended_figures[kind])
        for worker in self._workers:
            figures += worker.figures[kind]
        return _ADD[kind](figures)

    async def _read_figures_until_stopping(self) -> None:
        """Read the figures of all workers again and again: a worker may be killed at any time."""
        while True:
            # Not `wait_for`, which may lose a cancellation in Python 3.11.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_READING_S):
                    await self._stopping.wait()
                return
            for kind in _ADD:
                await self._figures(kind)

    @contextlib.contextmanager
    def _calling(
        self, workers: Iterable[_Worker], name: str, *arguments: object
    ) -> Iterator[_Call]:
        """A call of a function in these workers."""
        call = _Call(number=next(self._call_numbers), name=name, arguments=arguments)
        self._calls[call.number] = call
        for worker in workers:
            call.send_to(worker)
        yield call
        del self._calls[call.number]

    def _handle_result(self, worker: _Worker, message: Mapping[str, Any]) -> None:
        call = self._calls.get(message["result"])
        # The figures of a worker may arrive after the answer. The next ones are at least these.
        if call is None:
            return
        for kind in _ADD:
            if call.name == kind and "value" in message:
                worker.figures[kind] = message["value"]
        call.results[worker] = message
        call.wait_no_longer_for(worker)

    def _stop(self, number: int) -> None:
        """Pass a signal to every worker. After the first, kill workers that do not end in time."""
        if self._signal is None:
            # Otherwise connections that arrive after the last worker has stopped listening would
            # wait here for ever.
            self._listener.close()
            limit_s = self._settings.drain_s + self._settings.grace_s + _ENDING_S
            loop = asyncio.get_running_loop()
            loop.call_later(limit_s, self._kill_workers)
            loop.call_later(_STARTING_ENDING_S, self._kill_workers, True)
        self._signal = number
        self._stopping.set()
        for worker in self._workers:
            worker.signal(number)

    def _kill_workers(self, only_starting: bool = False) -> None:
        for worker in self._workers:
            if only_starting and worker.was_ready:
                continue
            _log.error("a worker does not end: killed", worker=worker.process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process.pid, signal.SIGKILL)


def settings_as_json(settings: Settings) -> str:
    """Every setting, secrets included, on one line of JSON."""
    values = settings.model_dump(mode="json")
    for name in values:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            values[name] = value.get_secret_value()
    return json.dumps(values)


@contextlib.contextmanager
def _shared_folder(memory: str = "/dev/shm") -> Iterator[str | None]:
    """A private folder for the workers while the context is open, in memory where that is allowed.

    None if no folder can be written: each worker then makes its own trials of bundles.
    """
    parent = memory if os.access(memory, os.W_OK) else None
    try:
        temporary = tempfile.TemporaryDirectory(
            prefix="evalmode-", dir=parent, ignore_cleanup_errors=True
        )
    except OSError:
        yield None
        return
    with temporary as folder:
        yield folder
