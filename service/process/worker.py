"""One of several server processes. A supervisor starts it and sends the settings.

Both use one socket, with a line of JSON for each message. The supervisor sends:

- the settings, once;
- {"unloaded": [NAME, ...], "shared_folder": PATH or null}, once: the models that were unloaded by
  request, and a folder that only the processes of this server use;
- {"others": N}, whenever the number of other workers that are ready changes.

The worker sends:

- {"refused": SENTENCE}, when it cannot start;
- {"ready": true, "log_fields": {...}}, when it serves;
- {"ready": bool, "reason": SENTENCE or null}, when its readiness changes.

Both send these, for what all processes do together:

- {"call": NUMBER, "name": "load", "arguments": ["languages"]}, to call a function. A worker's call
  is one of every worker, which the supervisor passes on;
- {"result": NUMBER, "value": ...}, or with {"error": CLASS, "sentence": ...} in place of the value.

The functions are load, unload, statistics and metrics. Loads and unloads take turns: the next one
is passed on when every worker has sent the result of the last one, also those that are starting.

The end of the socket means the end of the supervisor. Then the worker drains and ends as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalmode.errors import EvalmodeError
from evalmode.service import errors
from evalmode.service.all_processes import AllProcesses, Change, FigureKind, Functions
from evalmode.service.errors import RequestError
from evalmode.service.process.cause_of_death import REFUSED, STUCK
from evalmode.service.process.server import Service, serve_one
from evalmode.service.process.signals import Signals
from evalmode.service.settings import Settings
from evalmode.service.telemetry import structlog
from evalmode.service.telemetry.logs import configure_logs

if TYPE_CHECKING:
    from evalmode.service.process.graceful import GracefulServer

_log = structlog.get_logger("evalmode.service")

_TICK_S = 1.0
# How long the event loop has for the end of a process that is not live: `leave` takes 9 s at most.
_BLOCKED_S = 12.0

_STOPPING = {"error": "NotReady", "sentence": "the server is stopping"}


class SupervisorLink(AllProcesses):
    """A worker's end of the socket to its supervisor. Construction waits for the settings."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lines: TextIOWrapper = channel.makefile("r", encoding="utf-8")
        # Why the worker was not ready at the last check. None means ready.
        self._last_reason: str | None = None
        self._ready_others = 0
        self._is_orphaned = False
        # Several threads send, and a line must not begin within another.
        self._sending = threading.Lock()
        self._functions: Functions = {}
        self._has_functions = threading.Event()
        # The calls of this worker that have no result yet.
        self._call_numbers = itertools.count()
        self._results: dict[int, Future[Mapping[str, Any]]] = {}
        self.settings = Settings(**json.loads(self._lines.readline()))
        start = json.loads(self._lines.readline())
        self._unloaded = frozenset(start["unloaded"])
        folder = start["shared_folder"]
        self._shared_folder = None if folder is None else Path(folder)

    def listen(self) -> None:
        """Read messages in a thread from now on. When the supervisor ends, end this process."""

        def read() -> None:
            for line in self._lines:
                message = json.loads(line)
                if "others" in message:
                    self._ready_others = message["others"]
                elif "call" in message:
                    # In a thread of its own, because opening a model may take minutes.
                    threading.Thread(target=self._run, args=(message,), daemon=True).start()
                else:
                    self._end_call(message["result"], message)
            self._is_orphaned = True
            for number in list(self._results):
                self._end_call(number, _STOPPING)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=read, name="supervisor", daemon=True).start()

    def report_serving(self, service: Service) -> None:
        """Tell the supervisor that requests can arrive."""
        self._send(ready=True, log_fields=dict(service.log_fields))
        threading.Thread(
            target=self._end_when_blocked, args=(service,), name="watchdog", daemon=True
        ).start()

    def report_refusal(self, error: EvalmodeError) -> None:
        """Tell the supervisor why this worker cannot start."""
        self._send(refused=str(error))

    def watch(self, service: Service, server: GracefulServer) -> None:
        """Check the health of the service.

        1. A process that is not live ends, and the supervisor replaces it.
        2. A change of readiness is reported.
        3. A process that is not ready leaves connections to the others, if any is ready.
        """
        if reason := service.health.live():
            _log.error("a worker is not live: it ends", reason=reason)
            server.leave(STUCK)
            return
        reason = service.health.ready()
        became_ready = reason is None and self._last_reason is not None
        became_unready = reason is not None and self._last_reason is None
        if became_ready or became_unready:
            self._send(ready=reason is None, reason=reason)
        self._last_reason = reason
        server.accepts_connections = reason is None or self._ready_others == 0

    def _end_when_blocked(self, service: Service) -> None:
        """End this process when it is not live and its event loop does not call `watch`.

        Short batches run in the event loop. If one of them hangs, the loop does nothing else.
        """
        blocked_s = 0.0
        while blocked_s < _BLOCKED_S:
            time.sleep(_TICK_S)
            blocked_s = blocked_s + _TICK_S if service.health.live() else 0.0
        _log.error("a worker is not live and its event loop is blocked: it ends")
        self.clean_up()
        os._exit(STUCK)

    def clean_up(self) -> None:
        """Remove the shared folder if the supervisor is gone and cannot do it."""
        if self._is_orphaned and self._shared_folder is not None:
            shutil.rmtree(self._shared_folder, ignore_errors=True)

    @property
    def unloaded(self) -> frozenset[str]:
        """See `AllProcesses`."""
        return self._unloaded

    @property
    def shared_folder(self) -> Path | None:
        """See `AllProcesses`."""
        return self._shared_folder

    def offer(self, functions: Functions) -> None:
        """See `AllProcesses`. Earlier calls wait until then."""
        self._functions = functions
        self._has_functions.set()

    async def change(self, change: Change, model: str) -> None:
        """See `AllProcesses`."""
        await self._call(change, model)

    async def figures(self, kind: FigureKind) -> list[dict[str, Any]]:
        """See `AllProcesses`."""
        figures: list[dict[str, Any]] = await self._call(kind)
        return figures

    async def _call(self, name: str, *arguments: object) -> Any:
        """Call a function in every worker. Returns its result, or raises its error."""
        number = next(self._call_numbers)
        result: Future[Mapping[str, Any]] = Future()
        self._results[number] = result
        self._send(call=number, name=name, arguments=arguments)
        # After the end of the supervisor no thread reads results.
        if self._is_orphaned:
            self._end_call(number, _STOPPING)
        message = await asyncio.wrap_future(result)
        if "error" in message:
            error_class: type[RequestError] = getattr(errors, message["error"])
            raise error_class(message["sentence"])
        return message["value"]

    def _end_call(self, number: int, message: Mapping[str, Any]) -> None:
        result = self._results.pop(number, None)
        # The request that waits for it may have been cancelled.
        if result is not None and result.set_running_or_notify_cancel():
            result.set_result(message)

    def _run(self, message: Mapping[str, Any]) -> None:
        """Run a function that the supervisor calls, and send its result."""
        self._has_functions.wait()
        name = message["name"]
        result: dict[str, object]
        try:
            result = {"value": self._functions[name](*message["arguments"])}
        except RequestError as error:
            result = {"error": type(error).__name__, "sentence": str(error)}
        except Exception:
            # Any error at all: the request gets an answer, and the log its traceback.
            _log.exception("a call of the supervisor failed", call=name)
            sentence = f"{name} failed in a process of the server; its log says why"
            result = {"error": "RunFailed", "sentence": sentence}
        self._send(result=message["call"], **result)

    def _send(self, **message: Any) -> None:
        # OSError: the supervisor is gone, and the thread of `listen` ends this process.
        with self._sending, contextlib.suppress(OSError):
            self._channel.sendall(json.dumps(message).encode() + b"\n")


def work(
    listener_fd: int,
    channel_fd: int,
    *,
    open_service: Callable[[Settings, AllProcesses], Service] | None = None,
) -> int:
    """Serve on an inherited socket until a signal. Returns the exit code."""
    with Signals() as signals, socket.socket(fileno=listener_fd) as listener:
        link = SupervisorLink(socket.socket(fileno=channel_fd))
        configure_logs(link.settings.log_format)
        try:
            # Inside `try`: if the supervisor has already ended, this raises Stopped.
            link.listen()
            return serve_one(
                link.settings,
                listener,
                signals=signals,
                processes=link,
                on_serving=link.report_serving,
                watch=link.watch,
                open_service=open_service,
            )
        except EvalmodeError as error:
            link.report_refusal(error)
            return REFUSED
        finally:
            link.clean_up()


if __name__ == "__main__":
    sys.exit(work(int(sys.argv[1]), int(sys.argv[2])))
