"""uvicorn's server with a graceful end: it drains, stops listening, and answers what it accepted.

The end has the steps of `Step`. A signal, or the end of a step's time, leads to the next one:

1. DRAINING, for `drain_s`: not ready, and every request is answered. Each answer announces that its
   connection closes, so clients and load balancers turn to other servers.
2. STOPPING, for at most `grace_s`: nothing new is accepted. Accepted requests are answered.
3. LEAVING: the remaining requests get 503 or are cut off, and the application closes.

`GracefulServer` overrides these parts of `uvicorn.Server` (uvicorn 0.54):

- `serve`, which would handle the signals of the process;
- `startup`, which would accept connections through the loop's own server;
- `main_loop`, which has only one step;
- `shutdown`, which would close connections without lingering.

tests/service/process/test_uvicorn.py lists every private part that is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Coroutine
from enum import IntEnum
from pathlib import Path
from typing import Any

import structlog
import uvicorn

from evalmode.errors import EvalmodeError
from evalmode.service.health import Health
from evalmode.service.process.acceptor import Acceptor, connection_limit
from evalmode.service.process.connection import Connection, connection_class
from evalmode.service.process.connection_counts import ConnectionCounts
from evalmode.service.process.lingering_close import Connections
from evalmode.service.process.listener import tls_context
from evalmode.service.settings import Settings

_log = structlog.get_logger("evalmode.service")

_TICK_S = 1.0
# Connections that wait in the kernel until they are accepted; the kernel caps it (somaxconn).
_BACKLOG = 2048
# How long the closing handshake of TLS may take.
_TLS_CLOSING_S = 1.0
# The longest wait until connections that were given up have closed.
_GIVING_UP_S = 1.0
# The longest wait after that for the application to close its components.
_CLOSING_S = 8.0


class Step(IntEnum):
    """How far the end of a server has come. See the module's docstring."""

    SERVING = 0
    DRAINING = 1
    STOPPING = 2
    LEAVING = 3


class GracefulServer(uvicorn.Server):
    """Serves an application on one bound socket until a signal.

    Args:
        app: the ASGI application.
        settings: the limits of connections, and the times of the end.
        health: it becomes ready when the server listens, and not ready when the end begins.
        shared_folder: a private folder of the processes that accept from the same socket.
        on_serving: called when the server listens.
        watch: called every second while it serves. It may set `accepts_connections` and call
            `leave`.
        on_refusal: called with the reason of each refusal that the application does not see.

    Attributes:
        accepts_connections: while False, other processes on the same socket accept connections.
        exit_code: the exit code of the process; 0 unless `leave` sets another.
    """

    server_state: Connections

    def __init__(
        self,
        app: Callable[..., Any],
        settings: Settings,
        *,
        health: Health,
        shared_folder: Path | None = None,
        on_serving: Callable[[], None] = lambda: None,
        watch: Callable[[GracefulServer], None] = lambda server: None,
        on_refusal: Callable[[str], None] = lambda reason: None,
    ) -> None:
        super().__init__(_uvicorn_config(app, settings, on_refusal=on_refusal))
        self.server_state = Connections()
        if shared_folder is not None:
            # Without the counts, a process accepts what it can.
            with contextlib.suppress(OSError):
                self.server_state.counts = ConnectionCounts(shared_folder)
        self.exit_code = 0
        self.accepts_connections = True
        self._settings = settings
        self._health = health
        self._on_serving = on_serving
        self._watch = watch
        self._on_refusal = on_refusal
        self._step = Step.SERVING
        self._step_changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        # A thread, because no task can end the process while the application blocks the loop.
        self._watchdog = threading.Timer(
            settings.grace_s + _GIVING_UP_S + _CLOSING_S, self._exit_without_closing
        )
        self._watchdog.daemon = True

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on one bound socket until the end.

        Raises OSError if another process already listens there.
        """
        try:
            super().run(sockets)
        finally:
            self._watchdog.cancel()

    def signalled(self, number: int) -> None:
        """Go to the next step; SIGINT skips the draining. Safe in a signal handler."""
        if self._loop is None:
            # The loop has not begun: it will read the step when it does.
            self._handle_signal(number)
            return
        # RuntimeError: the loop has already ended.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._handle_signal, number)

    def leave(self, exit_code: int) -> None:
        """End at once with this exit code, and give up what is in flight. Call it from `watch`."""
        self.exit_code = exit_code
        self._advance_to(Step.LEAVING)

    # Called by `uvicorn.Server.run`, in this order.

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve in the running loop. The owner of the process passes its signals to `signalled`."""
        self._loop = asyncio.get_running_loop()
        await self._serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then listen."""
        assert sockets is not None
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise SystemExit(3)
        # The first tick sets the default headers of every answer.
        await self.on_tick(0)
        self._listener = sockets[0]
        try:
            limit = connection_limit(self._settings)
            self._listener.listen(_BACKLOG)
        except (OSError, EvalmodeError):
            await self.lifespan.shutdown()
            raise

        tls: dict[str, Any] = {}
        if self.config.ssl is not None:
            tls = {
                "ssl": self.config.ssl,
                "ssl_handshake_timeout": self._settings.header_timeout_s,
                "ssl_shutdown_timeout": _TLS_CLOSING_S,
            }
        self._acceptor = Acceptor(
            self._listener,
            new_connection=self._new_connection,
            connections=self.server_state,
            limit=limit,
            is_shared=self._settings.workers > 1,
            tls=tls,
            on_refusal=self._on_refusal,
        )
        self._acceptor.start()
        self.started = True
        self._health.serve()
        self._on_serving()

    async def main_loop(self) -> None:
        """Serve until the first signal, then drain."""
        while self._step is Step.SERVING:
            await self._wait_for_step(_TICK_S)
            await self.on_tick(0)
            self._watch(self)
            if self.accepts_connections != self.server_state.accepts:
                self.server_state.draining = not self.accepts_connections
                if self.accepts_connections:
                    self._acceptor.start()
                else:
                    self._acceptor.stop()

        self._health.drain()
        self.server_state.drain()
        _log.info("draining", connections=len(self.server_state.connections))
        deadline_s = self._now_s() + self._settings.drain_s
        while self._step is Step.DRAINING:
            remaining_s = deadline_s - self._now_s()
            if remaining_s <= 0:
                break
            await self._wait_for_step(min(remaining_s, _TICK_S))
            await self.on_tick(0)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept what waits in the kernel, answer every request, and close the application."""
        self._watchdog.start()
        deadline_s = self._now_s() + self._settings.grace_s
        self._advance_to(Step.STOPPING)

        # Close the listener at once: what the kernel accepts from now on would be reset.
        self._acceptor.stop()
        self._acceptor.accept_waiting()
        self._listener.close()
        await self._acceptor.wait_for_begun()

        self.server_state.stop()
        await self._wait_unless_leaving(self.server_state.all_closed.wait(), deadline_s)
        # An application may run on after its connection is closed.
        if tasks := set(self.server_state.tasks):
            await self._wait_unless_leaving(asyncio.wait(tasks), deadline_s)
        if self.server_state.connections or self.server_state.tasks:
            # Answer 503 where possible, cancel every request, and close every connection.
            remaining = set(self.server_state.tasks)
            _log.error(
                "given up", requests=len(remaining), connections=len(self.server_state.connections)
            )
            # Without this, uvicorn would log the traceback of every cancelled request.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            self.server_state.give_up()
            for task in remaining:
                task.cancel()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.server_state.all_closed.wait(), _GIVING_UP_S)
            self.server_state.abort()

        # `leave` was called. Such a process may be unable to close its application.
        if self.exit_code:
            os._exit(self.exit_code)
        try:
            await asyncio.wait_for(self.lifespan.shutdown(), _CLOSING_S)
        except TimeoutError:
            self._exit_without_closing()

    def _handle_signal(self, number: int) -> None:
        next_step = Step(min(self._step + 1, Step.LEAVING))
        if number == signal.SIGINT:
            next_step = max(next_step, Step.STOPPING)
        self._advance_to(next_step)

    def _advance_to(self, step: Step) -> None:
        self._step = max(self._step, step)
        self._step_changed.set()

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def _wait_for_step(self, timeout_s: float) -> None:
        """Wait until the step changes, at most `timeout_s`."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._step_changed.wait(), timeout_s)
        self._step_changed.clear()

    async def _wait_unless_leaving(
        self, condition: Coroutine[Any, Any, object], deadline_s: float
    ) -> None:
        """Wait until the condition holds, until the deadline, or until the last step."""
        waiting = asyncio.ensure_future(condition)
        while self._step < Step.LEAVING and not waiting.done():
            remaining_s = deadline_s - self._now_s()
            if remaining_s <= 0:
                break
            step_changed = asyncio.ensure_future(self._step_changed.wait())
            await asyncio.wait(
                (waiting, step_changed), timeout=remaining_s, return_when=asyncio.FIRST_COMPLETED
            )
            step_changed.cancel()
            self._step_changed.clear()
        waiting.cancel()

    def _new_connection(self) -> Connection:
        # uvicorn's type of this class has other arguments than the class `connection_class` made.
        protocol_class: Any = self.config.http_protocol_class
        connection: Connection = protocol_class(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return connection

    def _exit_without_closing(self) -> None:
        _log.error("the application does not close: left without it")
        os._exit(self.exit_code)


def _uvicorn_config(
    app: Callable[..., Any], settings: Settings, *, on_refusal: Callable[[str], None]
) -> uvicorn.Config:
    context = tls_context(settings)
    return uvicorn.Config(
        app,
        http=connection_class(settings, on_refusal=on_refusal),
        loop="uvloop",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        workers=1,
        # Without this, a request would inherit the context variables of an earlier request on its
        # connection, such as the request id in the logs.
        reset_contextvars=True,
        timeout_keep_alive=settings.keep_alive_s,
        ssl_context_factory=(lambda config, default: context) if context else None,
    )
