"""uvicorn's server with an end in good order: not ready first, then closed, and everything accepted
is answered.

Knows no model and no route. The owner of the process hands signals over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Generator
from enum import IntEnum
from typing import Any

import structlog
import uvicorn

from evalmode.errors import EvalmodeError
from evalmode.service.health import Health
from evalmode.service.process.acceptor import Acceptor, most_connections
from evalmode.service.process.connection import Connection, connection_within
from evalmode.service.process.lingering_close import Connections
from evalmode.service.process.listener import tls_context
from evalmode.service.settings import Settings

_log = structlog.get_logger("evalmode.service")

_TICK_S = 1.0
_BACKLOG = 2048
_TLS_CLOSING_S = 1.0
# The longest wait for what was given up to notice it, and after that for the application to close
# its parts.
_GIVING_UP_S = 1.0
_CLOSING_S = 8.0


class Step(IntEnum):
    """How far the end of a server has come. Each signal takes it a step further."""

    SERVING = 0
    DRAINING = 1  # not ready, and everything is answered: load balancers look elsewhere
    STOPPING = 2  # no new connections; what was accepted is answered
    LEAVING = 3  # what is not answered by now is given up


class GracefulServer(uvicorn.Server):
    """Serves an application on one bound socket until a signal.

    `serving` is called when it listens. `watch` is called every second; it may set `welcome` and
    call `leave`.
    """

    server_state: Connections

    def __init__(
        self,
        app: Callable[..., Any],
        settings: Settings,
        *,
        health: Health,
        serving: Callable[[], None] = lambda: None,
        watch: Callable[[GracefulServer], None] = lambda server: None,
        refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        super().__init__(_config(app, settings, refused=refused))
        self.server_state = Connections()
        self.exit_code = 0
        # whether connections are taken; where not, another process that listens there takes them
        self.welcome = True
        self._settings = settings
        self._health = health
        self._serving = serving
        self._watch = watch
        self._refused = refused
        self._step = Step.SERVING
        self._further = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watchdog = threading.Timer(settings.grace_s + _GIVING_UP_S + _CLOSING_S, self._exit)
        self._watchdog.daemon = True

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on one bound socket until the end. Raises OSError when another process listens
        there already.
        """
        try:
            super().run(sockets)
        finally:
            self._watchdog.cancel()

    def signalled(self, number: int) -> None:
        """Take the end a step further; SIGINT leaves out the draining. Safe in a signal handler."""
        if self._loop is None:  # it has not begun
            self._signalled(number)
            return
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self._signalled, number)

    def leave(self, exit_code: int) -> None:
        """End at once, with this code: what is in flight is given up. Call it from `watch`."""
        self.exit_code = exit_code
        self._reach(Step.LEAVING)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve in a loop that runs already, as `run` does in one of its own."""
        self._loop = asyncio.get_running_loop()
        await self._serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then listen."""
        assert sockets is not None
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise SystemExit(3)
        await self.on_tick(0)  # the headers that every answer has
        self._listener = sockets[0]
        try:
            most = most_connections(self._settings)
            self._listener.listen(_BACKLOG)
        except (OSError, EvalmodeError):
            await self.lifespan.shutdown()
            raise
        self._acceptor = Acceptor(
            self._listener,
            make=self._connection,
            state=self.server_state,
            most=most,
            is_shared=self._settings.workers > 1,
            tls=self._tls(),
            refused=self._refused,
        )
        self._acceptor.start()
        self.started = True
        self._health.serve()
        self._serving()

    async def main_loop(self) -> None:
        """Serve until the first signal, then until the time for draining is over."""
        while self._step is Step.SERVING:
            await self._unless_further(_TICK_S)
            await self.on_tick(0)
            self._watch(self)
            self._heed()
        self._health.drain()
        self.server_state.drain()
        _log.info("draining", connections=len(self.server_state.connections))
        until_s = self._now_s() + self._settings.drain_s
        while self._step is Step.DRAINING and (left_s := until_s - self._now_s()) > 0:
            await self._unless_further(min(left_s, _TICK_S))
            await self.on_tick(0)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take what the kernel has accepted, answer all that was asked, and close the
        application.
        """
        self._watchdog.start()
        until_s = self._now_s() + self._settings.grace_s
        self._reach(Step.STOPPING)
        await self._stop_listening()
        self.server_state.stop()
        await self._unless_leaving(self.server_state.none_left.wait(), until_s)
        if tasks := set(self.server_state.tasks):
            await self._unless_leaving(asyncio.wait(tasks), until_s)
        if self.server_state.connections or self.server_state.tasks:
            await self._give_up()
        # what makes this process useless may keep the application from closing, too
        if self.exit_code:
            os._exit(self.exit_code)
        try:
            await asyncio.wait_for(self.lifespan.shutdown(), _CLOSING_S)
        except TimeoutError:
            self._exit()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Capture none: the owner of the process hands its signals over."""
        yield

    def _signalled(self, number: int) -> None:
        least = Step.STOPPING if number == signal.SIGINT else Step.DRAINING
        self._reach(max(least, Step(min(self._step + 1, Step.LEAVING))))

    def _reach(self, step: Step) -> None:
        self._step = max(self._step, step)
        self._further.set()

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def _unless_further(self, wait_s: float) -> None:
        """Wait, but no longer than until the next step."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._further.wait(), wait_s)
        self._further.clear()

    async def _unless_leaving(self, end: Coroutine[Any, Any, object], until_s: float) -> None:
        """Wait for this end until then, but no longer than until the last step."""
        ending = asyncio.ensure_future(end)
        while (
            self._step < Step.LEAVING
            and not ending.done()
            and (left_s := until_s - self._now_s()) > 0
        ):
            further = asyncio.ensure_future(self._further.wait())
            await asyncio.wait(
                (ending, further), timeout=left_s, return_when=asyncio.FIRST_COMPLETED
            )
            further.cancel()
            self._further.clear()
        ending.cancel()

    def _heed(self) -> None:
        if self.welcome == self._acceptor.is_accepting:
            return
        self.server_state.draining = not self.welcome
        if self.welcome:
            self._acceptor.start()
        else:
            self._acceptor.stop()

    async def _stop_listening(self) -> None:
        self._acceptor.stop()
        self._acceptor.take_what_is_left()
        self._listener.close()  # at once: what the kernel accepts from now on would be reset
        await self._acceptor.all_begun()

    async def _give_up(self) -> None:
        tasks = set(self.server_state.tasks)
        _log.error("given up", requests=len(tasks), connections=len(self.server_state.connections))
        # that line stands for a traceback of each
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self.server_state.give_up()
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.server_state.none_left.wait(), _GIVING_UP_S)
        self.server_state.abort()

    def _connection(self) -> Connection:
        kind: Any = self.config.http_protocol_class  # the class that `connection_within` made
        connection: Connection = kind(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return connection

    def _tls(self) -> dict[str, Any]:
        if self.config.ssl is None:
            return {}
        return {
            "ssl": self.config.ssl,
            "ssl_handshake_timeout": self._settings.header_timeout_s,
            "ssl_shutdown_timeout": _TLS_CLOSING_S,
        }

    def _exit(self) -> None:
        _log.error("the application does not close: left without it")
        os._exit(self.exit_code)


def _config(
    app: Callable[..., Any], settings: Settings, *, refused: Callable[[str], None]
) -> uvicorn.Config:
    context = tls_context(settings)
    return uvicorn.Config(
        app,
        http=connection_within(settings, refused=refused),
        loop="uvloop",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        workers=1,
        # Or a request would begin with what an earlier one on its connection had bound: with its
        # id.
        reset_contextvars=True,
        timeout_keep_alive=settings.keep_alive_s,
        ssl_context_factory=(lambda config, default: context) if context else None,
    )
