"""One of several server processes, as a supervisor starts them: told its settings, it tells how it
is. Knows no route.

Both use one socket, a line of JSON each time. To the worker: first its settings, then {"others": N}
whenever the number of other workers that take requests changes. From it: {"refused": SENTENCE} when
it cannot start, {"ready": true, "told": {...}} when it serves, {"ready": bool, "why": SENTENCE}
when that changes. When the socket ends the supervisor has ended: then the worker drains and ends by
itself.
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
from typing import Any

import structlog

from evalmode.errors import EvalmodeError
from evalmode.service.process.graceful import GracefulServer
from evalmode.service.process.server import Service, serve_one
from evalmode.service.process.signals import Signals
from evalmode.service.process.worker_codes import REFUSED, STUCK
from evalmode.service.settings import METRICS_FOLDER_VARIABLE, Settings
from evalmode.service.telemetry.logs import configure_logs

_log = structlog.get_logger("evalmode.service")


class Supervised:
    """A worker's end of the socket to its supervisor."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lines: TextIOWrapper = channel.makefile("r", encoding="utf-8")
        self._was_ready: str | None = None
        self._others = 0
        self._orphaned = False
        self.settings = Settings(**json.loads(self._lines.readline()))

    def listen(self) -> None:
        """From now on take what the supervisor says, in a thread of its own; without a supervisor,
        end.
        """
        threading.Thread(target=self._listen, name="supervisor", daemon=True).start()

    def serving(self, service: Service) -> None:
        """Tell that requests can come."""
        self._tell(ready=True, told=dict(service.told))

    def refused(self, error: EvalmodeError) -> None:
        """Tell why this worker cannot start."""
        self._tell(refused=str(error))

    def watch(self, service: Service, server: GracefulServer) -> None:
        """Tell when readiness changes; leave new connections to others when not ready; end when
        nothing helps.
        """
        if reason := service.health.live():
            _log.error("leaving", reason=reason)
            server.leave(STUCK)
            return
        reason = service.health.ready()
        if reason != self._was_ready and (reason is None or self._was_ready is None):
            self._tell(ready=reason is None, why=reason)
        self._was_ready = reason
        server.welcome = reason is None or self._others == 0

    def tidy(self) -> None:
        """Remove what the supervisor would have removed, were it still there."""
        if self._orphaned and (folder := os.environ.get(METRICS_FOLDER_VARIABLE)):
            shutil.rmtree(folder, ignore_errors=True)

    def _listen(self) -> None:
        for line in self._lines:
            self._others = json.loads(line)["others"]
        self._orphaned = True
        os.kill(os.getpid(), signal.SIGTERM)

    def _tell(self, **what: Any) -> None:
        with contextlib.suppress(OSError):  # the supervisor is gone: `_listen` ends this process
            self._channel.sendall(json.dumps(what).encode() + b"\n")


def work(
    listener_fd: int, channel_fd: int, *, open_service: Callable[[Settings], Service] | None = None
) -> int:
    """Serve on an inherited socket until told to stop; the exit code."""
    with Signals() as signals, socket.socket(fileno=listener_fd) as listener:
        supervised = Supervised(socket.socket(fileno=channel_fd))
        configure_logs(supervised.settings.log_format)
        try:
            supervised.listen()  # within: where the supervisor has ended already, this ends us
            return serve_one(
                supervised.settings,
                listener,
                signals=signals,
                serving=supervised.serving,
                watch=supervised.watch,
                open_service=open_service,
            )
        except EvalmodeError as error:
            supervised.refused(error)
            return REFUSED
        finally:
            supervised.tidy()


if __name__ == "__main__":
    sys.exit(work(int(sys.argv[1]), int(sys.argv[2])))
