"""Accepts connections from a listening socket, up to a limit, and answers 503 above the limit.

uvloop's own server accepts every connection that the kernel has. Without free file descriptors it
resets connections, those of health probes too. So the limit here is below the number of
descriptors. A readable socket leads to these decisions, in order:

1. Below the limit, a connection is accepted and served.
2. At the limit, or with more connections than its share, one of several workers first leaves the
   connection to the others for a moment.
3. At the limit, `SURPLUS` more connections are accepted. Each gets one health probe answered, and
   503 for everything else. If there are already that many, the oldest is closed.
4. If no file descriptor is free, a spare one is closed for a moment. With it the connection is
   accepted, answered with 503, and closed.
5. After any other error, nothing is accepted for a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import structlog

from evalmode.service.errors import StartFailed, error_body
from evalmode.service.process.connection import Connection
from evalmode.service.process.lingering_close import Connections
from evalmode.service.settings import Settings

_log = structlog.get_logger("evalmode.service")

# Connections above the limit: health probes, and clients that wait for their 503.
SURPLUS = 32
# File descriptors that are opened later: bundles that are swapped, metrics, key files, and sockets
# of closed connections, which the loop closes in its next turn.
_SPARE_DESCRIPTORS = 32
_DEFAULT_LIMIT = 10_000
# With fewer connections, a server is of no use.
_LOWEST_LIMIT = 8
# The count where the system does not list the open descriptors. A server that starts has about 20.
_ASSUMED_DESCRIPTORS = 64

# Connections accepted in one turn of the loop. With more, those that are open would wait.
_ACCEPTS_PER_TURN = 128
# The same for several workers on one socket that do not know how many connections the others have.
# With more, the first to wake would accept them all.
_SHARED_ACCEPTS_PER_TURN = 4
# The same above the limit. A connection begins two turns later. With a quarter of `SURPLUS` per
# turn, it can get its 503 before newer connections replace it.
_SURPLUS_ACCEPTS_PER_TURN = 8
# How long a worker at its limit leaves a connection to the others, which may have room.
_LEAVE_TO_OTHERS_S = 0.02
# The same for a worker that has more connections than its share: another one accepts at once,
# unless it is busy.
_LEAVE_SHARE_S = 0.002
# A worker may have this part more connections than the one with the fewest. Otherwise a thousand
# connections would be accepted one by one.
_UNEVEN_SHARE = 1 / 8
_RETRY_S = 0.05
# A full server would otherwise log one line for each connection.
_LOG_INTERVAL_S = 60.0
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_BODY = error_body("", "the server has no file descriptors left: retry in 1 s")
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%s" % (len(_BODY), _BODY)
)


def connection_limit(settings: Settings) -> int:
    """How many connections this process accepts.

    The setting `max_connections` decides. Without it, the limit of open files (RLIMIT_NOFILE)
    does, up to `_DEFAULT_LIMIT`. Raises StartFailed if the limit of open files is too low.
    """
    file_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if file_limit == resource.RLIM_INFINITY:
        return settings.max_connections or _DEFAULT_LIMIT

    open_count = _ASSUMED_DESCRIPTORS
    for folder in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            open_count = len(os.listdir(folder))
            break
    available = file_limit - open_count - _SPARE_DESCRIPTORS - SURPLUS

    if settings.max_connections is not None and settings.max_connections > available:
        raise StartFailed(
            f"setting max_connections (--max-connections, EVALMODE_MAX_CONNECTIONS) is"
            f" {settings.max_connections}, but the limit of {file_limit} open files has room for"
            f" {max(0, available)}: raise the limit (ulimit -n) or lower the setting"
        )
    if available < _LOWEST_LIMIT:
        raise StartFailed(
            f"the limit of {file_limit} open files has no room for connections: raise it"
            f" (ulimit -n) to {file_limit - available + _LOWEST_LIMIT} or more"
        )
    return settings.max_connections or min(available, _DEFAULT_LIMIT)


class Acceptor:
    """Accepts connections from a listening socket between `start` and `stop`.

    Args:
        listener: the socket, which already listens.
        new_connection: makes the protocol of a connection.
        connections: the state that all connections of this server share.
        limit: how many connections this process serves.
        is_shared: whether other processes accept connections from the same socket.
        tls: the arguments of `connect_accepted_socket` for TLS, else empty.
        on_refusal: called with the reason of each refusal that no connection reports itself.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        new_connection: Callable[[], Connection],
        connections: Connections,
        limit: int,
        is_shared: bool,
        tls: dict[str, Any],
        on_refusal: Callable[[str], None],
    ) -> None:
        self._listener = listener
        self._new_connection = new_connection
        self._connections = connections
        self._limit = limit
        self._is_shared = is_shared
        knows_its_share = not is_shared or connections.counts is not None
        self._accepts_per_turn = _ACCEPTS_PER_TURN if knows_its_share else _SHARED_ACCEPTS_PER_TURN
        self._tls = tls
        self._on_refusal = on_refusal
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._last_log_s = -_LOG_INTERVAL_S
        self._spare_descriptor: int | None = None
        listener.setblocking(False)

    def start(self) -> None:
        """Accept connections from now on."""
        self._resume()
        self._connections.accepts = True
        self._connections.count_changed()

    def stop(self) -> None:
        """Accept nothing more. Connections wait in the kernel, or another process accepts them."""
        self._connections.accepts = False
        self._connections.count_changed()
        self._loop.remove_reader(self._listener.fileno())
        if self._retry is not None:
            self._retry.cancel()
        self._close_spare_descriptor()

    def accept_waiting(self) -> None:
        """Accept every connection that waits in the kernel, whatever the limit."""
        with contextlib.suppress(OSError):
            while True:
                self._begin(self._listener.accept()[0], probes_only=False)

    async def wait_for_begun(self) -> None:
        """Wait until every accepted connection has begun, or has failed to."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    # Decisions, in the order of the module's docstring.

    def _on_readable(self) -> None:
        if self._is_shared and self._is_full():
            self._pause(_LEAVE_TO_OTHERS_S, then=partial(self._accept_after_others, True))
        elif self._has_its_share():
            self._pause(_LEAVE_SHARE_S, then=partial(self._accept_after_others, False))
        else:
            # A worker that reaches its limit here leaves the rest to its next turn.
            self._accept_some(with_surplus=not self._is_shared)

    def _accept_after_others(self, with_surplus: bool) -> None:
        self._loop.add_reader(self._listener.fileno(), self._on_readable)
        self._accept_some(with_surplus=with_surplus)

    def _is_full(self) -> bool:
        return self._connections.open_count >= self._limit

    def _has_its_share(self) -> bool:
        """Whether another process has so many fewer connections that it should take the next."""
        counts = self._connections.counts
        lowest = counts.lowest_of_others() if counts is not None else None
        if lowest is None:
            return False
        return self._connections.open_count > lowest + int(_UNEVEN_SHARE * lowest)

    def _accept_some(self, *, with_surplus: bool) -> None:
        """Accept what one turn of the loop allows.

        `with_surplus`: connections above the limit too. Without it, connections beyond the share of
        this process are left to a later turn, except for the first.
        """
        surplus_count = 0
        for accepted_count in range(self._accepts_per_turn):
            if accepted_count and not with_surplus and self._has_its_share():
                return
            is_surplus = self._is_full()
            if is_surplus and not with_surplus:
                return
            if surplus_count == _SURPLUS_ACCEPTS_PER_TURN:
                return
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in _NO_DESCRIPTORS:
                    self._log_rarely("a connection cannot be accepted", reason=str(error))
                    self._pause(_RETRY_S, then=self._resume)
                    return
                self._log_rarely("no file descriptors are left for connections", reason=str(error))
                if not self._refuse_with_spare_descriptor():
                    return
                continue
            if is_surplus:
                surplus_count += 1
                self._log_rarely(
                    "the limit of connections is reached: only health probes are answered",
                    max_connections=self._limit,
                )
                if len(self._connections.surplus) >= SURPLUS:
                    self._evict_surplus()
            self._begin(connection, probes_only=is_surplus)

    def _evict_surplus(self) -> None:
        """Close a connection above the limit.

        The choice, in order: the oldest that is closing already, the oldest that has sent nothing,
        and the oldest.
        """
        surplus = self._connections.surplus
        begun = [protocol for protocol in surplus if protocol not in self._connections.arriving]
        protocol = next((protocol for protocol in begun if protocol.is_ending), None)
        if protocol is None:
            protocol = next((protocol for protocol in begun if protocol.is_silent), None)
        if protocol is None:
            protocol = next(iter(surplus))
        task = surplus.pop(protocol)
        if protocol in self._connections.arriving:
            task.cancel()
        else:
            protocol.evict()

    def _refuse_with_spare_descriptor(self) -> bool:
        """Accept a connection with the spare descriptor, answer 503 and close it.

        Otherwise it would stay in the kernel and wake the loop again and again. False if nothing
        could be accepted.
        """
        self._close_spare_descriptor()
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError:
            self._pause(_RETRY_S, then=self._resume)
            return False
        else:
            self._on_refusal("too_many_connections")
            with connection, contextlib.suppress(OSError):
                connection.setblocking(False)
                # Before its handshake, TLS can carry no answer.
                if not self._tls:
                    # Unread bytes would turn the close into a reset.
                    with contextlib.suppress(BlockingIOError):
                        connection.recv(65_536)
                    connection.send(_REFUSAL)
            return True
        finally:
            self._open_spare_descriptor()

    # Beginning a connection.

    def _begin(self, connection: socket.socket, *, probes_only: bool) -> None:
        connection.setblocking(False)
        protocol = self._new_connection()
        protocol.probes_only = probes_only
        self._connections.arriving.add(protocol)
        self._connections.count_changed()
        task = self._loop.create_task(self._connect(connection, protocol))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if probes_only:
            self._connections.surplus[protocol] = task

    async def _connect(self, connection: socket.socket, protocol: Connection) -> None:
        tls = self._tls
        try:
            if tls and await self._sends_plain_text(connection):
                protocol.is_plain_at_tls, tls = True, {}
            await self._loop.connect_accepted_socket(lambda: protocol, connection, **tls)
        except (OSError, asyncio.CancelledError) as error:
            # The TLS handshake failed, or a newer connection took this one's place.
            _log.debug("a connection ended before it began", error=str(error))
            self._connections.surplus.pop(protocol, None)
            connection.close()
        finally:
            self._connections.arriving.discard(protocol)
            self._connections.count_changed()

    async def _sends_plain_text(self, connection: socket.socket) -> bool:
        """Whether the first byte is a letter or a line end, as in HTTP but never in TLS.

        The byte stays in the socket. After a failed handshake no answer would be possible, because
        asyncio has closed the socket. Raises TimeoutError if no byte arrives in time.
        """
        readable = asyncio.Event()
        self._loop.add_reader(connection.fileno(), readable.set)
        try:
            async with asyncio.timeout(self._tls["ssl_handshake_timeout"]):
                await readable.wait()
        finally:
            self._loop.remove_reader(connection.fileno())
        first_byte = connection.recv(1, socket.MSG_PEEK)
        return first_byte.isalpha() or first_byte in (b"\r", b"\n")

    # Pauses, the spare descriptor, and the log.

    def _pause(self, pause_s: float, *, then: Callable[[], None]) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._retry = self._loop.call_later(pause_s, then)

    def _resume(self) -> None:
        self._open_spare_descriptor()
        self._loop.add_reader(self._listener.fileno(), self._on_readable)

    def _open_spare_descriptor(self) -> None:
        if self._spare_descriptor is None:
            with contextlib.suppress(OSError):
                self._spare_descriptor = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _close_spare_descriptor(self) -> None:
        if self._spare_descriptor is not None:
            os.close(self._spare_descriptor)
            self._spare_descriptor = None

    def _log_rarely(self, event: str, **fields: object) -> None:
        if self._loop.time() - self._last_log_s >= _LOG_INTERVAL_S:
            self._last_log_s = self._loop.time()
            _log.warning(event, **fields)
