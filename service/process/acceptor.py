"""Takes connections from a listening socket, as many as a process may have, and turns others away
with a word.

The loop's own server takes whatever the kernel has. When the process has no file descriptors left
it resets connections, those of probes of health too. Here the number of connections is bounded
below the number of descriptors. Above the bound a few more are taken: one probe each is answered,
and everything else gets 503. The oldest of them makes room for the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
from collections.abc import Callable
from typing import Any

import structlog

from evalmode.service.errors import StartFailed, error_body
from evalmode.service.process.connection import Connection
from evalmode.service.process.lingering_close import Connections
from evalmode.service.settings import Settings

_log = structlog.get_logger("evalmode.service")

# Connections above the limit: probes, and those that wait to get 503.
SURPLUS = 32
# File descriptors that are opened later: bundles that are swapped, figures, key files, and sockets
# whose connection has ended and which the loop closes in its next turn.
_SPARE_DESCRIPTORS = 32
_MOST_BY_DEFAULT = 10_000
_FEWEST = 8

# Taken in one turn of the loop, so that others are answered in between. Of several workers on one
# socket the first that wakes would take all.
_AT_ONCE = 128
_AT_ONCE_SHARED = 4
# Of those above the limit: a connection is made two turns later, and of 32 there is always one that
# can still get 503 before it makes room.
_SURPLUS_AT_ONCE = 8
_RETRY_S = 0.05
# Of several workers, one at its limit would otherwise refuse what another has room for.
_LEFT_TO_OTHERS_S = 0.02
_LOG_EVERY_S = 60.0
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_BODY = error_body("", "the server has no file descriptors left: retry in 1 s")
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%s" % (len(_BODY), _BODY)
)


def most_connections(settings: Settings) -> int:
    """How many connections this process takes: as the settings say, else by the limit of open files
    (RLIMIT_NOFILE), at most 10,000.

    Raises StartFailed where the limit has no room for them.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return settings.max_connections or _MOST_BY_DEFAULT
    room = limit - _open_descriptors() - _SPARE_DESCRIPTORS - SURPLUS
    if settings.max_connections is not None and settings.max_connections > room:
        raise StartFailed(
            f"setting max_connections (--max-connections, EVALMODE_MAX_CONNECTIONS) is"
            f" {settings.max_connections}, but the limit of {limit} open files has room for"
            f" {max(0, room)}: raise the limit (ulimit -n) or lower the setting"
        )
    if room < _FEWEST:
        raise StartFailed(
            f"the limit of {limit} open files has no room for connections: raise it (ulimit -n) to"
            f" {limit - room + _FEWEST} or more"
        )
    return settings.max_connections or min(room, _MOST_BY_DEFAULT)


def _open_descriptors() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return len(os.listdir(folder))
    return 64


class Acceptor:
    """Takes connections from `listener`, a socket that listens, while it is started.

    `make` makes the protocol of a connection. `refused` is called with the reason of each refusal
    that no connection gives itself. `is_shared` says that other processes take connections from
    the same socket. `tls` are the arguments of `connect_accepted_socket` for TLS.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        make: Callable[[], Connection],
        state: Connections,
        most: int,
        is_shared: bool,
        tls: dict[str, Any],
        refused: Callable[[str], None],
    ) -> None:
        self._listener = listener
        self._make = make
        self._state = state
        self._most = most
        self._is_shared = is_shared
        self._at_once = _AT_ONCE_SHARED if is_shared else _AT_ONCE
        self._tls = tls
        self._refused = refused
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._logged_s = -_LOG_EVERY_S
        self._spare: int | None = None
        self.is_accepting = False
        listener.setblocking(False)

    def start(self) -> None:
        """Take connections from now on."""
        self._open_spare()
        self._loop.add_reader(self._listener.fileno(), self._accept)
        self.is_accepting = True

    def stop(self) -> None:
        """Leave connections to the kernel, or to another process that listens there."""
        self.is_accepting = False
        self._loop.remove_reader(self._listener.fileno())
        if self._retry is not None:
            self._retry.cancel()
        self._close_spare()

    def take_what_is_left(self) -> None:
        """Take what the kernel has accepted so far, whatever the limit."""
        with contextlib.suppress(OSError):
            while True:
                self._take(self._listener.accept()[0], probes_only=False)

    async def all_begun(self) -> None:
        """Wait until every connection that was taken has begun, or has broken off."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _accept(self) -> None:
        """Take connections. At the limit, another worker gets the time to take them first."""
        if self._is_shared and self._is_full():
            self._loop.remove_reader(self._listener.fileno())
            self._retry = self._loop.call_later(_LEFT_TO_OTHERS_S, self._accept_surplus)
        else:
            self._accept_some(with_surplus=not self._is_shared)

    def _accept_surplus(self) -> None:
        self._loop.add_reader(self._listener.fileno(), self._accept)
        self._accept_some(with_surplus=True)

    def _is_full(self) -> bool:
        return len(self._state.connections) + len(self._state.arriving) >= self._most

    def _accept_some(self, *, with_surplus: bool) -> None:
        surplus_count = 0
        for _ in range(self._at_once):
            is_surplus = self._is_full()
            if surplus_count == _SURPLUS_AT_ONCE or (is_surplus and not with_surplus):
                return
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if isinstance(error, ConnectionAbortedError):
                    continue
                if error.errno not in _NO_DESCRIPTORS:
                    self._log_once("no connection can be taken", reason=str(error))
                    self._pause()
                    return
                self._log_once("no file descriptors are left for connections", reason=str(error))
                if not self._turn_away():
                    return
                continue
            if is_surplus:
                surplus_count += 1
                self._log_once(
                    "as many connections as this process takes: others than probes get 503",
                    max_connections=self._most,
                )
                if len(self._state.surplus) >= SURPLUS:
                    self._make_room()
            self._take(connection, probes_only=is_surplus)

    def _take(self, connection: socket.socket, *, probes_only: bool) -> None:
        connection.setblocking(False)
        protocol = self._make()
        protocol.probes_only = probes_only
        self._state.arriving.add(protocol)
        task = self._loop.create_task(self._begin(connection, protocol))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if probes_only:
            self._state.surplus[protocol] = task

    async def _begin(self, connection: socket.socket, protocol: Connection) -> None:
        tls = self._tls
        try:
            if tls and await self._sends_plain_text(connection):
                protocol.is_plain_at_tls, tls = True, {}
            await self._loop.connect_accepted_socket(lambda: protocol, connection, **tls)
        except (OSError, asyncio.CancelledError) as error:  # a TLS handshake that failed
            _log.debug("a connection broke off before it began", error=str(error))
            self._state.surplus.pop(protocol, None)
            connection.close()
        finally:
            self._state.arriving.discard(protocol)
            self._state.check()

    async def _sends_plain_text(self, connection: socket.socket) -> bool:
        """Whether the first byte of a client is a letter or a line end, as in HTTP: no handshake of
        TLS begins so. The byte is left in the socket.

        After a handshake that failed nothing could be said any more: asyncio has closed the socket.
        Raises TimeoutError when no byte comes in the time of a handshake.
        """
        readable = asyncio.Event()
        self._loop.add_reader(connection.fileno(), readable.set)
        try:
            async with asyncio.timeout(self._tls["ssl_handshake_timeout"]):
                await readable.wait()
        finally:
            self._loop.remove_reader(connection.fileno())
        first = connection.recv(1, socket.MSG_PEEK)
        return first.isalpha() or first in (b"\r", b"\n")

    def _make_room(self) -> None:
        """End one of the connections above the limit: the oldest that ends already, or that has
        sent nothing, or at worst the oldest.
        """
        surplus = self._state.surplus
        made = [protocol for protocol in surplus if protocol not in self._state.arriving]
        oldest = next((protocol for protocol in made if protocol.is_ending), None)
        oldest = oldest or next((protocol for protocol in made if protocol.is_silent), None)
        oldest = oldest or next(iter(surplus))
        task = surplus.pop(oldest)
        if oldest in self._state.arriving:
            task.cancel()
        else:
            oldest.make_room()

    def _turn_away(self) -> bool:
        """Take a connection with the spare descriptor, answer 503, and close it.

        Otherwise it would wait in the kernel, and wake the loop again and again.
        """
        self._close_spare()
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError:
            self._pause()
            return False
        else:
            self._refused("too_many_connections")
            with connection, contextlib.suppress(OSError):
                connection.setblocking(False)
                if not self._tls:
                    with contextlib.suppress(BlockingIOError):
                        connection.recv(65_536)  # what is unread would become a reset
                    connection.send(_REFUSAL)
            return True
        finally:
            self._open_spare()

    def _pause(self) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._retry = self._loop.call_later(_RETRY_S, self._resume)

    def _resume(self) -> None:
        self._open_spare()
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _open_spare(self) -> None:
        if self._spare is None:
            with contextlib.suppress(OSError):
                self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _close_spare(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def _log_once(self, event: str, **fields: object) -> None:
        if self._loop.time() - self._logged_s >= _LOG_EVERY_S:
            self._logged_s = self._loop.time()
            _log.warning(event, **fields)
