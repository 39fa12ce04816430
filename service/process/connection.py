"""One HTTP/1.1 connection, within limits: its requests, one at a time. Knows no server.

Requests are parsed one at a time. What follows a request waits as bytes, and nothing more is read,
until its answer is complete and the client has taken enough of what was written. So a connection
holds one request and one piece of what the kernel received, however many requests a client sends.

Slow bodies are the application's affair: it reads them.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl

from evalmode.service.health import PROBE_PATHS
from evalmode.service.process.lingering_close import (
    EVERY_ANSWER_BEGINS,
    IDLE_LINGER_S,
    Connections,
    Outlet,
)
from evalmode.service.process.refusals import (
    ConnectionLimits,
    Refused,
    RefusingProtocol,
    body_bytes_of,
    framing_too_long,
    head_too_late,
    head_too_long,
    no_http,
    path_of,
    stopped,
    tls_here,
    too_many_connections,
)
from evalmode.service.settings import Settings

# A client that connected so recently has a request on its way.
_FRESH_S = 1.0
# A connection above the limit is for probes, which send their request at once.
_SURPLUS_HEAD_S = 1.0
_PROBES = frozenset(path.encode() for path in PROBE_PATHS)
_UPGRADES = (b"upgrade", b"http2-settings")
_END_OF_HEAD = b"\r\n\r\n"
# Given to the parser in one turn of the loop: some 0.5 ms, however small the client makes them.
_MOST_PIECES = 256
# After the client has closed its side, the first and the longest wait between two looks at whether
# it has closed the other side as well.
_FIRST_LOOK_S = 0.01
_LONGEST_LOOK_S = 1.0
_TCP_CLOSE = 7  # the first byte of TCP_INFO after a reset, see linux/tcp.h


def connection_within(
    settings: Settings, *, refused: Callable[[str], None] = lambda reason: None
) -> type[Connection]:
    """The protocol class for `uvicorn.Config(http=...)` with the limits of these settings."""

    class ConnectionWithin(Connection):
        limits = ConnectionLimits(
            header_bytes=settings.max_header_bytes,
            header_timeout_s=settings.header_timeout_s,
            body_timeout_s=settings.body_timeout_s,
            refused=refused,
        )
        read_timeout_s = settings.body_timeout_s

    return ConnectionWithin


class _Flow(FlowControl):
    """uvicorn's flow control, with a hold: while it lasts a cycle that asks for more of its body
    does not make the transport read.
    """

    is_held = False

    def hold(self) -> None:
        """Read nothing until `release`."""
        self.is_held = True
        self.pause_reading()

    def release(self) -> None:
        """Read again."""
        if self.is_held:
            self.is_held = False
            self.resume_reading()

    def resume_reading(self) -> None:
        """Read again, unless there is a hold."""
        if not self.is_held:
            super().resume_reading()


class Connection(RefusingProtocol):
    """uvicorn's protocol within `limits`; `connection_within` makes a class that has some.

    With `probes_only`, as above the limit of connections, one probe of health is answered, and
    everything else gets 503. With `is_plain_at_tls` the client sends plain text where the server
    speaks TLS: whatever it asks gets 400.
    """

    flow: _Flow

    def __init__(
        self,
        config: Config,
        server_state: Connections,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.probes_only = False
        self.is_plain_at_tls = False
        self._heads = 0
        self._left_bytes: int | None = 0  # of the body, to be given to the parser
        self._upgrading = False
        self._framing_bytes = 0  # of a chunked body since its last data, such as trailers
        self._received = b""
        self._position = 0  # of the first byte in `_received` that the parser has not seen
        self._tail = b""  # what of an empty line the parser has seen, at most
        self._half_closed = False
        self._look_timer: asyncio.TimerHandle | None = None

    # What the transport calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a head."""
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self._made_s = self.loop.time()
        self._wait(
            _SURPLUS_HEAD_S if self.probes_only else self.limits.header_timeout_s,
            self._head_is_late,
        )

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop what was received."""
        super().connection_lost(exc)
        self._received = b""
        if self._look_timer is not None:
            self._look_timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Parse as far as the next request to answer."""
        if self._deaf:
            return
        self._unset_keepalive_if_required()
        # Nothing is left of it but where the transport was already reading when it was held.
        self._received = self._received[self._position :] + data if self._received else data
        self._position = 0
        self._parse()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep a connection whose client closed its sending side for the answers that it waits for.

        TLS has no half-closed connections in asyncio: there the client has hung up.
        """
        if self._deaf or self.transport.get_extra_info("sslcontext") is not None:
            self._close()
            return False
        self._half_closed = True
        if not self._must_wait():
            self._refuse_unfinished()
            return False
        if self._answering() and not self.cycle.response_started:
            # A client that is gone looks the same, until something is sent to it. Every answer
            # begins with these bytes, so they can be sent before the rest is known.
            self.transport.write(EVERY_ANSWER_BEGINS)
            self.has_begun_answer = True
        self._look_for_reset(_FIRST_LOOK_S)
        return True

    def resume_writing(self) -> None:
        """Go on with the requests that waited for the client to read."""
        super().resume_writing()
        if not (self._deaf or self._in_head or self._in_body or self.transport.is_closing()):
            self._go_on()

    def timeout_keep_alive_handler(self) -> None:
        """End a connection that lies idle, unless a request has arrived at this very moment."""
        if self._unread():
            self._wait_for_head()
        else:
            self._linger(IDLE_LINGER_S)

    # What the parser and the request's cycle call.

    def on_message_begin(self) -> None:
        """Note that a head begins."""
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._in_head = True
        self._heads += 1
        self._head_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header of the head. A trailer is dropped: it must not count as a header (RFC
        9110, section 6.5.1).
        """
        if not self._in_body:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """Hand a piece of the body to the application."""
        self._framing_bytes = 0
        self._arrived_bytes += len(body)
        super().on_body(body)

    def on_headers_complete(self) -> None:
        """Hand a head that is as it should be to the application."""
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._upgrading = True
            return
        if self.is_plain_at_tls:
            raise tls_here()
        self.url = path_of(self.url, method=self.parser.get_method())
        self._body_bytes = self._left_bytes = body_bytes_of(
            self.url,
            self.headers,
            version=self.parser.get_http_version(),
            most_bytes=self.limits.header_bytes,
        )
        self._arrived_bytes = 0
        if self.probes_only and self.url.partition(b"?")[0] not in _PROBES:
            raise too_many_connections()
        super().on_headers_complete()
        self._in_head, self._in_body = False, True
        self._wait_no_more()
        outlet = Outlet(self)
        self.cycle.transport = outlet  # type: ignore[assignment]  # it has what a cycle calls
        self.cycle.on_response = outlet.complete
        if self.probes_only or (self.server_state.draining and not self._more_heads()):
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """Note that a request has come whole."""
        if self._upgrading:
            return
        super().on_message_complete()
        self._in_body = False
        # it was answered before its body was there
        if self.cycle.response_complete and not self._deaf:
            self._wait_no_more()
            self._wait_for_next()

    def on_response_complete(self) -> None:
        """Go on with the next request, or with what is to be done before the connection ends."""
        self.server_state.total_requests += 1
        if self._deaf or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        if self._in_body:
            self.flow.resume_reading()
            self._wait(self.limits.body_timeout_s, self.end)
        else:
            self._go_on()

    # What the server calls.

    def retire(self) -> None:
        """Let the last of the answers that the client waits for, where it is not yet begun, say
        that the connection ends with it.
        """
        if not self._more_heads():
            super().retire()

    def wind_up(self) -> None:
        """End as soon as every request that has come is answered, within the limits of time."""
        if self._deaf or self.transport.is_closing():
            return
        if self._answering():
            self.retire()
        elif self.flow.is_held:
            return  # the client has to read first, and `_watch_reader` bounds its time
        elif self._in_head or self._in_body or self._unread():
            self._wait_for_head()
        elif self._heads == 0 and (left_s := self._made_s + _FRESH_S - self.loop.time()) > 0:
            self._wait(left_s, self._fresh_no_more)
        else:
            self._linger(IDLE_LINGER_S)

    def give_up(self) -> None:
        """End now, with 503 where an answer is owed and not begun."""
        if self._answering() and not self.cycle.response_started and not self._deaf:
            self._disown()
            self._say(stopped())
        else:
            self._close()

    def make_room(self) -> None:
        """End at once: another connection needs the file descriptor."""
        if not self._deaf and not self._answering():
            self._say(too_many_connections())
        self._close()

    @property
    def is_silent(self) -> bool:
        """Whether its client has sent nothing yet."""
        return self._heads == 0 and not self._unread()

    @property
    def is_ending(self) -> bool:
        """Whether all is written, and only the client's end is waited for."""
        return self._deaf

    # Requests, one at a time.

    def _parse(self) -> None:
        """Give the parser what was received, up to the end of the request to answer next; hold what
        is left.
        """
        received_bytes, pieces = len(self._received), 0
        while self._position < received_bytes and not self._deaf and not self._must_wait():
            if pieces == _MOST_PIECES:
                self.flow.hold()
                self.loop.call_soon(self._parse)
                return
            pieces += 1
            start, end = self._position, self._end_of_piece()
            self._position = end
            self._feed(
                self._received
                if end - start == received_bytes
                else memoryview(self._received)[start:end]
            )
        if self._deaf or self.transport.is_closing():
            return
        if self._position < received_bytes:
            self.flow.hold()
            return
        self._received = b""
        self._position = 0
        if self._half_closed:
            if not self._must_wait():
                self._refuse_unfinished()
            return
        self.flow.release()
        # a head that is not whole, or empty lines, which may stand before a request
        if not self._in_body and not self._answering():
            self._wait_for_head()

    def _must_wait(self) -> bool:
        """Whether the next request waits: for an answer, or for the client to read."""
        return not self._in_body and (self._answering() or self.flow.write_paused)

    def _end_of_piece(self) -> int:
        """Up to where the parser may be given what was received, without giving it two requests.

        A head ends with an empty line, and so does the last chunk of a body; the parser accepts no
        other end. An empty line within a chunk only makes the pieces smaller.
        """
        received, start = self._received, self._position
        if self._in_body and self._left_bytes is not None:
            return min(len(received), start + self._left_bytes)
        if self._tail:
            place = (self._tail + received[start : start + 3]).find(_END_OF_HEAD)
            end = start + place + len(_END_OF_HEAD) - len(self._tail)
        else:
            place = -1
        if place < 0:
            place = received.find(_END_OF_HEAD, start)
            end = place + len(_END_OF_HEAD)
        if place < 0:
            self._tail = (self._tail + received[max(start, len(received) - 3) :])[-3:]
            return len(received)
        self._tail = b""
        return end

    def _feed(self, piece: bytes | memoryview) -> None:
        if self._in_body and self._left_bytes is not None:
            self._left_bytes -= len(piece)
        self._framing_bytes = self._framing_bytes + len(piece) if self._in_body else 0
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            self._go_on_without_upgrade()
            return
        except httptools.HttpParserError as error:
            cause = error.__context__
            if isinstance(cause, Refused):
                self._refuse(cause)
            elif self.is_plain_at_tls:
                self._refuse(tls_here())
            else:
                self._refuse(no_http(error, bytes(piece[:2]), is_first=self._heads <= 1))
            return
        if self._in_head:
            self._head_bytes += len(piece)
            if self._head_bytes > self.limits.header_bytes:
                self._refuse(head_too_long(self.limits.header_bytes))
        elif self._in_body and self._framing_bytes > self.limits.header_bytes:
            self._refuse(framing_too_long(self.limits.header_bytes))

    def _go_on(self) -> None:
        """Take up the next request, once the one before is answered and the client reads."""
        if self._must_wait():
            return
        if self._position < len(self._received):
            self._parse()
            is_parsed = self._position >= len(self._received)
            if self._deaf or self._in_body or self._must_wait() or not is_parsed:
                return
        if self._half_closed:
            self._close()
        else:
            self.flow.resume_reading()
            self._wait_for_next()

    def _more_heads(self) -> bool:
        return self._received.find(_END_OF_HEAD, self._position) >= 0

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _look_for_reset(self, wait_s: float) -> None:
        """Hang up after a reset by the client: nothing is read any more that would tell of it."""
        if self.transport.is_closing() or not hasattr(socket, "TCP_INFO"):
            return
        client = self.transport.get_extra_info("socket")
        if client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE:
            self.transport.abort()
            return
        self._look_timer = self.loop.call_later(
            wait_s, self._look_for_reset, min(2 * wait_s, _LONGEST_LOOK_S)
        )

    # What is waited for.

    def _wait_for_head(self) -> None:
        if self._timer is None and not self._answering():
            self._wait(self.limits.header_timeout_s, self._head_is_late)

    def _wait_for_next(self) -> None:
        if self._in_head:
            self._wait_for_head()
        elif self.server_state.stopping:
            self.wind_up()
        else:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _head_is_late(self) -> None:
        self._refuse(
            too_many_connections()
            if self.probes_only
            else head_too_late(self.limits.header_timeout_s)
        )

    def _fresh_no_more(self) -> None:
        self._wait_no_more()
        self.wind_up()

    # The end, and a head that asks for another protocol.

    def _linger(self, linger_s: float) -> None:
        self._received = b""
        if self._half_closed:  # nothing more will come
            self._close()
            return
        self.flow.release()
        super()._linger(linger_s)

    def _go_on_without_upgrade(self) -> None:
        """Parse the head again without its wish for another protocol.

        The parser takes all that follows for that protocol; but a server may ignore the wish, and
        some HTTP/2 clients state it with every first request.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        head = [method, b" ", self.url, b" HTTP/", version, b"\r\n"]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(token for token in tokens if token.lower() not in _UPGRADES)
            if name not in _UPGRADES:
                head += [name, b": ", value, b"\r\n"]
        self._upgrading = self._in_head = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._feed(b"".join([*head, b"\r\n"]))
