"""How an HTTP/1.1 connection ends: so that its client reads all that was written, and in a bounded
time.

uvicorn closes its sockets at once; whatever the client is sending then makes the kernel send a
reset, which may reach the client before it has read our answer. Here the last byte is followed by
the end of our side, and what still comes is read and dropped for a moment. Knows no limit on
requests and no server.
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

IDLE_LINGER_S = 0.5
UNREAD_LINGER_S = 2.0
EVERY_ANSWER_BEGINS = b"HTTP/1.1 "


class Connections(ServerState):
    """What all connections of a server share: themselves, whether the end has begun, and an event
    for when all left.
    """

    def __init__(self) -> None:
        super().__init__()
        self.arriving: set[Any] = set()  # taken from the kernel, and not yet made
        # Those above the limit with the tasks that began them, oldest first.
        self.surplus: dict[Any, asyncio.Task[None]] = {}
        self.draining = False
        self.stopping = False
        self.none_left = asyncio.Event()

    def drain(self) -> None:
        """Every answer from now on tells its client to go elsewhere with the next request."""
        self.draining = True
        for connection in self._all():
            connection.retire()

    def stop(self) -> None:
        """Let every connection end as soon as what it asked is answered."""
        self.draining = self.stopping = True
        for connection in self._all():
            connection.wind_up()
        self.check()

    def give_up(self) -> None:
        """Answer 503 where an answer is still owed, and end."""
        for connection in self._all():
            connection.give_up()

    def abort(self) -> None:
        """End every connection, whatever it does."""
        for connection in self._all():
            connection.transport.abort()

    def check(self) -> None:
        """Set the event when the last connection of a server that stops is gone."""
        if self.stopping and not self.connections:
            self.none_left.set()

    def _all(self) -> list[Any]:  # each is of the class that the server's configuration names
        return list(self.connections)


class Outlet:
    """What a request's cycle writes to: the transport, but that it keeps the head until the body
    begins.

    Together they are one system call, and one packet that wakes the client once. The end is the
    connection's affair.
    """

    def __init__(self, connection: EndingProtocol) -> None:
        self._connection = connection
        self._transport = connection.transport
        self._head: bytes | None = None
        self._is_begun = False
        self.is_closing = connection.transport.is_closing

    def write(self, data: bytes) -> None:
        """Write, or keep the head."""
        is_interim = data.startswith(b"HTTP/1.1 100 ")
        data = self._connection.without_beginning(data)
        if self._head is not None:
            head, self._head = self._head, None
            self._transport.writelines((head, data))
        elif self._is_begun or is_interim:
            self._transport.write(data)
        else:
            self._head, self._is_begun = data, True

    def close(self) -> None:
        """End the connection when all is written."""
        self._flush()
        self._connection.end()

    def complete(self) -> None:
        """Tell the connection that the answer is written."""
        self._flush()
        self._connection.on_response_complete()

    def _flush(self) -> None:
        if self._head is not None:  # no body followed, as after HEAD
            head, self._head = self._head, None
            self._transport.write(head)


class EndingProtocol(HttpToolsProtocol):
    """uvicorn's protocol with ends in good order. A class of it says how long a client may leave
    something unread.
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
        self._timer: asyncio.TimerHandle | None = (
            None  # of the one thing that is waited for: a head, a body, the end
        )
        self._write_timer: asyncio.TimerHandle | None = None
        self._in_body = False
        self._deaf = False  # what comes is read and dropped
        self.has_begun_answer = False  # the first bytes of the next answer are sent already

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count among the connections of the server."""
        super().connection_made(transport)
        self.server_state.arriving.discard(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of everything that would keep this object."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._wait_no_more()
        self._stop_watching()
        self.server_state.surplus.pop(self, None)
        self.server_state.check()

    def pause_writing(self) -> None:
        """Wait only so long for a client that does not read."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """Go on writing to a client that reads again."""
        super().resume_writing()
        self._stop_watching()

    def without_beginning(self, data: bytes) -> bytes:
        """The start of an answer, without the bytes that were sent ahead of it."""
        if self.has_begun_answer:
            self.has_begun_answer = False
            return data[len(EVERY_ANSWER_BEGINS) :]
        return data

    def retire(self) -> None:
        """Let the newest answer, where it is not yet begun, say that the connection ends with
        it.
        """
        if self.cycle is not None and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def end(self) -> None:
        """End after what was written, without cutting off a client that still sends."""
        if self._in_body or self._unread():
            self._linger(UNREAD_LINGER_S)
        else:
            self._close()

    def _linger(self, linger_s: float) -> None:
        if self._deaf or self.transport.is_closing():
            return
        self._deaf = True
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        elif linger_s == IDLE_LINGER_S:  # TLS tells the client in its own words, and waits for its
            self._close()
            return
        self._wait(linger_s, self._close)

    def _close(self) -> None:
        self._deaf = True
        self._unset_keepalive_if_required()
        self._wait_no_more()
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._watch_reader()

    def _watch_reader(self, unread_bytes: int | None = None) -> None:
        """Abort when the client has taken nothing of `unread_bytes` since the last look."""
        self._stop_watching()
        left_bytes = self.transport.get_write_buffer_size()
        if unread_bytes is not None and left_bytes >= unread_bytes:
            self.transport.abort()
            return
        self._write_timer = self.loop.call_later(
            self.read_timeout_s, self._watch_reader, left_bytes
        )

    def _stop_watching(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _unread(self) -> int:
        """Bytes that the kernel has received and we have not."""
        try:
            answer = fcntl.ioctl(
                self.transport.get_extra_info("socket").fileno(), termios.FIONREAD, bytes(4)
            )
        except OSError:
            return 0
        return int.from_bytes(answer, sys.byteorder)

    def _wait(self, wait_s: float, then: Callable[[], None]) -> None:
        self._wait_no_more()
        self._timer = self.loop.call_later(wait_s, then)

    def _wait_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
