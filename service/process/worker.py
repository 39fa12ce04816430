"""One of several server processes. A supervisor starts it and sends the settings.

Both use one socket, with a line of JSON for each message. The supervisor sends:

- the settings, once;
- {"others": N}, whenever the number of other workers that are ready changes.

The worker sends:

- {"refused": SENTENCE}, when it cannot start;
- {"ready": true, "log_fields": {...}}, when it serves;
- {"ready": bool, "reason": SENTENCE or null}, when its readiness changes.

The end of the socket means the end of the supervisor. Then the worker drains and ends as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

from evalmode.errors import EvalmodeError
from evalmode.service.process.cause_of_death import REFUSED, STUCK
from evalmode.service.process.server import Service, serve_one
from evalmode.service.process.signals import Signals
from evalmode.service.settings import METRICS_FOLDER_VARIABLE, Settings
from evalmode.service.telemetry import structlog
from evalmode.service.telemetry.logs import configure_logs

if TYPE_CHECKING:
    from evalmode.service.process.graceful import GracefulServer

_log = structlog.get_logger("evalmode.service")


class SupervisorLink:
    """A worker's end of the socket to its supervisor. Construction waits for the settings."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lines: TextIOWrapper = channel.makefile("r", encoding="utf-8")
        # Why the worker was not ready at the last check. None means ready.
        self._last_reason: str | None = None
        self._ready_others = 0
        self._is_orphaned = False
        self.settings = Settings(**json.loads(self._lines.readline()))

    def listen(self) -> None:
        """Read messages in a thread from now on. When the supervisor ends, end this process."""

        def read() -> None:
            for line in self._lines:
                self._ready_others = json.loads(line)["others"]
            self._is_orphaned = True
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=read, name="supervisor", daemon=True).start()

    def report_serving(self, service: Service) -> None:
        """Tell the supervisor that requests can arrive."""
        self._send(ready=True, log_fields=dict(service.log_fields))

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

    def clean_up(self) -> None:
        """Remove the folder of the metrics if the supervisor is gone and cannot do it."""
        folder = os.environ.get(METRICS_FOLDER_VARIABLE)
        if self._is_orphaned and folder:
            shutil.rmtree(folder, ignore_errors=True)

    def _send(self, **message: Any) -> None:
        # OSError: the supervisor is gone, and the thread of `listen` ends this process.
        with contextlib.suppress(OSError):
            self._channel.sendall(json.dumps(message).encode() + b"\n")


def work(
    listener_fd: int, channel_fd: int, *, open_service: Callable[[Settings], Service] | None = None
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
