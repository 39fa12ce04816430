"""Ends an HTTP/1.1 connection so that the client can read the whole answer, in a bounded time.

uvicorn closes its sockets at once. If the client is still sending, the kernel then sends a reset,
and the reset may overtake the answer. Here the server closes only its sending side after the last
byte. Then it reads and drops input for a moment, and closes the socket.

`LingeringProtocol` overrides these private parts of uvicorn 0.54 (`HttpToolsProtocol`):
`connection_made`, `connection_lost`, `pause_writing` and `resume_writing`.
tests/service/process/test_uvicorn.py lists every part that is used.
"""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios
from collections.abc import Callable
from typing import Any, ClassVar

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from evalmode.service.process.connection_counts import ConnectionCounts

# How long input is read and dropped before the socket closes. An idle client may just be sending
# its next request, which takes one round trip.
IDLE_LINGER_S = 0.5
# A client in the middle of a body often reads no answer until it has sent more.
UNREAD_LINGER_S = 2.0
# Every answer begins with these bytes: they can be sent before its status is decided.
ANSWER_PREFIX = b"HTTP/1.1 "


class Connections(ServerState):
    """The state that all connections of a server share. It extends uvicorn's `ServerState`.

    Attributes:
        arriving: connections that are accepted, and whose protocol is not connected yet.
        surplus: connections above the limit with the tasks that begin them, oldest first.
        draining: each answer from now on says "connection: close".
        stopping: each connection closes as soon as its requests are answered.
        all_closed: set when the server is stopping and no connection is open.
        accepts: whether this process accepts connections.
        counts: the connections of all processes of this server; None if there are no others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.arriving: set[Any] = set()
        self.surplus: dict[Any, asyncio.Task[None]] = {}
        self.draining = False
        self.stopping = False
        self.all_closed = asyncio.Event()
        self.accepts = False
        self.counts: ConnectionCounts | None = None

    @property
    def open_count(self) -> int:
        """The number of connections, including those whose protocol is not connected yet."""
        return len(self.connections) + len(self.arriving)

    def count_changed(self) -> None:
        """A connection was accepted or has closed."""
        if self.counts is not None:
            self.counts.publish(self.open_count if self.accepts else None)
        self.update_all_closed()

    def drain(self) -> None:
        """Make every answer from now on announce that its connection closes."""
        self.draining = True
        for connection in self._snapshot():
            connection.announce_close()

    def stop(self) -> None:
        """Close every connection as soon as its requests are answered."""
        self.draining = self.stopping = True
        for connection in self._snapshot():
            connection.finish()
        self.update_all_closed()

    def give_up(self) -> None:
        """Answer 503 to every request whose answer has not begun, and close."""
        for connection in self._snapshot():
            connection.give_up()

    def abort(self) -> None:
        """Close every connection at once, without its unsent bytes."""
        for connection in self._snapshot():
            connection.transport.abort()

    def update_all_closed(self) -> None:
        """Set `all_closed` if the last connection of a stopping server has closed."""
        if self.stopping and not self.connections:
            self.all_closed.set()

    def _snapshot(self) -> list[Any]:
        # A copy, because a connection that closes removes itself from the set. uvicorn's type has
        # no `announce_close`, so these are Any.
        return list(self.connections)


class Outlet:
    """The transport that a request's cycle writes to. It holds the head back until the body begins.

    So head and body are one system call, and one packet that wakes the client once. Closing is
    left to the connection. The cycle calls `write`, `close` and `is_closing` (uvicorn 0.54).
    """

    def __init__(self, connection: LingeringProtocol) -> None:
        self._connection = connection
        self._transport = connection.transport
        self._head: bytes | None = None
        self._has_begun = False
        self.is_closing = connection.transport.is_closing

    def write(self, data: bytes) -> None:
        """Write `data`, or hold it back if it is the head."""
        is_interim = data.startswith(b"HTTP/1.1 100 ")
        data = self._connection.without_sent_prefix(data)
        if self._head is not None:
            head, self._head = self._head, None
            self._transport.writelines((head, data))
        elif self._has_begun or is_interim:
            self._transport.write(data)
        else:
            self._head, self._has_begun = data, True

    def close(self) -> None:
        """Close the connection when everything is written."""
        self._flush()
        self._connection.end()

    def complete(self) -> None:
        """Tell the connection that the answer is written."""
        self._flush()
        self._connection.on_response_complete()

    def _flush(self) -> None:
        # An answer without a body, such as one to HEAD, leaves its head here.
        if self._head is not None:
            head, self._head = self._head, None
            self._transport.write(head)


class LingeringProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a lingering close. A subclass sets `read_timeout_s`.

    A client that reads nothing for `read_timeout_s` while bytes wait for it is disconnected.
    """

    read_timeout_s: ClassVar[float]
    server_state: Connections

    def __init__(
        self,
        config: Config,
        server_state: Connections,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        # A connection waits for one thing at a time: a head, the rest of a body, or the end.
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._in_body = False
        # Whether input is read and dropped, because the connection ends.
        self._drops_input = False
        # Whether ANSWER_PREFIX of the next answer is already sent.
        self._prefix_is_sent = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count this among the open connections of the server."""
        super().connection_made(transport)
        self.server_state.arriving.discard(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel every timer, and remove this object from the state of the server."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._cancel_timer()
        self._stop_write_timer()
        self.server_state.surplus.pop(self, None)
        self.server_state.count_changed()

    def pause_writing(self) -> None:
        """Disconnect the client if it reads nothing for `read_timeout_s`."""
        super().pause_writing()
        self._watch_write_buffer()

    def resume_writing(self) -> None:
        """Write again to a client that has read."""
        super().resume_writing()
        self._stop_write_timer()

    def send_prefix(self) -> None:
        """Send the first bytes of the answer now, before its status is decided."""
        self.transport.write(ANSWER_PREFIX)
        self._prefix_is_sent = True

    def without_sent_prefix(self, data: bytes) -> bytes:
        """The start of an answer, without the prefix if that is already sent."""
        if self._prefix_is_sent:
            self._prefix_is_sent = False
            return data[len(ANSWER_PREFIX) :]
        return data

    def announce_close(self) -> None:
        """Make the newest answer say "connection: close", if it has not begun."""
        if self.cycle is not None and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def end(self) -> None:
        """Close after everything is written, without a reset for a client that still sends."""
        if self._in_body or self._unread_bytes():
            self._linger(UNREAD_LINGER_S)
        else:
            self._close()

    def _linger(self, linger_s: float) -> None:
        """Close the sending side, drop input for `linger_s`, then close."""
        if self._drops_input or self.transport.is_closing():
            return
        self._drops_input = True
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        elif linger_s == IDLE_LINGER_S:
            # TLS has no half-closed connection in asyncio. Its closing handshake tells the client,
            # and waits for the client's.
            self._close()
            return
        self._set_timer(linger_s, self._close)

    def _close(self) -> None:
        self._drops_input = True
        self._unset_keepalive_if_required()
        self._cancel_timer()
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._watch_write_buffer()

    def _watch_write_buffer(self, previous_bytes: int | None = None) -> None:
        """Abort if the client has read nothing of `previous_bytes`; else look again later."""
        self._stop_write_timer()
        unsent_bytes = self.transport.get_write_buffer_size()
        if previous_bytes is not None and unsent_bytes >= previous_bytes:
            self.transport.abort()
            return
        self._write_timer = self.loop.call_later(
            self.read_timeout_s, self._watch_write_buffer, unsent_bytes
        )

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _unread_bytes(self) -> int:
        """How many bytes the kernel has received and the loop has not read."""
        try:
            count = fcntl.ioctl(
                self.transport.get_extra_info("socket").fileno(), termios.FIONREAD, bytes(4)
            )
        except OSError:
            return 0
        return int.from_bytes(count, sys.byteorder)

    def _set_timer(self, delay_s: float, callback: Callable[[], None]) -> None:
        self._cancel_timer()
        self._timer = self.loop.call_later(delay_s, callback)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
