"""One HTTP/1.1 connection within limits: how its requests are parsed and take turns.

A client may send many requests at once. They are parsed one at a time:

1. The parser gets the bytes up to the end of one request.
2. The rest waits as bytes, and the connection reads nothing more.
3. When the answer is complete, and the client has read enough of it, the next request follows.

So a connection holds one request and one piece of what the kernel received. The application reads
bodies, and sets the limits of time for them.

`Connection` is the protocol of uvicorn 0.54 for httptools (`HttpToolsProtocol`). uvicorn has no
limit on a head or on the time of a client, and queues all requests that a client sends at once. So
these private parts are overridden:

- the callbacks of the transport: `connection_made`, `connection_lost`, `data_received`,
  `eof_received`, `resume_writing`;
- the callbacks of the parser: `on_message_begin`, `on_header`, `on_headers_complete`, `on_body`,
  `on_message_complete`;
- `on_response_complete`, which a request's cycle calls, and `timeout_keep_alive_handler`.

A cycle (`RequestResponseCycle`) is uvicorn's object for one request and its answer.

tests/service/process/test_uvicorn.py lists every part that is used, and fails if one is missing.
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
from evalmode.service.process.lingering_close import IDLE_LINGER_S, Connections, Outlet
from evalmode.service.process.refusals import (
    ConnectionLimits,
    Refusal,
    RefusingProtocol,
    body_bytes_of,
    framing_too_long,
    head_too_late,
    head_too_long,
    not_http,
    path_of,
    server_stopped,
    tls_required,
    too_many_connections,
)
from evalmode.service.settings import Settings

# A client that connected less than this ago is assumed to have a request on its way.
_FRESH_S = 1.0
# A connection above the limit is for health probes, which send their request at once.
_SURPLUS_HEAD_S = 1.0
_PROBES = frozenset(path.encode() for path in PROBE_PATHS)
_UPGRADES = (b"upgrade", b"http2-settings")
_HEAD_END = b"\r\n\r\n"
# How many pieces the parser gets in one turn of the loop: about 0.5 ms of work, even if the client
# sends nothing but empty lines. With more, one client would keep the others waiting.
_PIECES_PER_TURN = 256
# After the client has closed its sending side: the first and the longest interval between two
# checks for a reset.
_FIRST_RESET_CHECK_S = 0.01
_LONGEST_RESET_CHECK_S = 1.0
# The first byte of the socket option TCP_INFO after a reset: TCP_CLOSE in netinet/tcp.h.
_TCP_CLOSE = 7


def connection_class(
    settings: Settings, *, on_refusal: Callable[[str], None] = lambda reason: None
) -> type[Connection]:
    """The protocol class for `uvicorn.Config(http=...)`, with the limits of these settings.

    `on_refusal` is called with the reason of each refusal that the application does not see.
    """

    class LimitedConnection(Connection):
        limits = ConnectionLimits(
            header_bytes=settings.max_header_bytes,
            header_timeout_s=settings.header_timeout_s,
            body_timeout_s=settings.body_timeout_s,
            on_refusal=on_refusal,
        )
        read_timeout_s = settings.body_timeout_s

    return LimitedConnection


class _Flow(FlowControl):
    """uvicorn's flow control with a hold. During a hold nothing makes the transport read.

    Without it, a cycle that asks for more of its body would resume reading (uvicorn 0.54).
    """

    is_held = False

    def hold(self) -> None:
        """Read nothing until `release`."""
        self.is_held = True
        self.pause_reading()

    def release(self) -> None:
        """End a hold and read again."""
        if self.is_held:
            self.is_held = False
            self.resume_reading()

    def resume_reading(self) -> None:
        """Read again, except during a hold."""
        if not self.is_held:
            super().resume_reading()


class Connection(RefusingProtocol):
    """A connection within `limits`. `connection_class` makes a subclass that has them.

    Attributes:
        probes_only: the connection is above the limit of connections. It answers one health probe,
            and everything else gets 503.
        is_plain_at_tls: the client sends plain text where the server speaks TLS. Every request
            gets 400.
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
        self._connected_s = 0.0
        self._head_count = 0
        # Bytes of the body that the parser has not seen. None while a body comes in chunks.
        self._unparsed_body_bytes: int | None = 0
        self._wants_upgrade = False
        # Bytes of a body in chunks since its last data: chunk sizes and trailers.
        self._framing_bytes = 0
        self._received = b""
        # The index in `_received` of the first byte that the parser has not seen.
        self._position = 0
        # The last bytes that the parser has seen, if a head may end within the next ones.
        self._tail = b""
        self._is_half_closed = False
        self._reset_timer: asyncio.TimerHandle | None = None

    # Called by the transport.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, and wait for a head."""
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self._connected_s = self.loop.time()
        head_timeout_s = self.limits.header_timeout_s
        if self.probes_only:
            head_timeout_s = _SURPLUS_HEAD_S
        self._set_timer(head_timeout_s, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop the received bytes."""
        super().connection_lost(exc)
        self._received = b""
        if self._reset_timer is not None:
            self._reset_timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Parse up to the end of the next request."""
        if self._drops_input:
            return
        self._unset_keepalive_if_required()
        # Bytes are left from before only if the transport was already reading when it was held.
        if self._received:
            data = self._received[self._position :] + data
        self._received = data
        self._position = 0
        self._parse()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client has closed its sending side. Keep the connection while it waits for answers.

        TLS has no half-closed connections in asyncio: there the client has hung up.
        """
        if self._drops_input or self.transport.get_extra_info("sslcontext") is not None:
            self._close()
            return False
        self._is_half_closed = True
        if not self._must_wait():
            self._refuse_unfinished()
            return False

        # A client that is gone looks the same, until something is sent to it. The prefix of the
        # answer can be sent before its status is decided; a client that is gone resets then.
        if self._is_answering() and not self.cycle.response_started:
            self.send_prefix()
        self._check_for_reset(_FIRST_RESET_CHECK_S)
        return True

    def resume_writing(self) -> None:
        """The client has read: continue with the requests that waited for this."""
        super().resume_writing()
        if not (self._drops_input or self._in_head or self._in_body or self.transport.is_closing()):
            self._continue()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, unless a request has arrived at this very moment."""
        if self._unread_bytes():
            self._wait_for_head()
        else:
            self._linger(IDLE_LINGER_S)

    # Called by the parser, and by the cycle of a request.

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._in_head = True
        self._head_count += 1
        self._head_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header. A trailer is dropped: it must not count as a header (RFC 9110, 6.5.1)."""
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A head is complete. Raises Refusal, which reaches `_feed`, or starts the application."""
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._wants_upgrade = True
            return
        if self.is_plain_at_tls:
            raise tls_required()
        self.url = path_of(self.url, method=self.parser.get_method())
        self._body_bytes = self._unparsed_body_bytes = body_bytes_of(
            self.url,
            self.headers,
            version=self.parser.get_http_version(),
            max_head_bytes=self.limits.header_bytes,
        )
        self._arrived_bytes = 0
        if self.probes_only and self.url.partition(b"?")[0] not in _PROBES:
            raise too_many_connections()

        super().on_headers_complete()
        self._in_head, self._in_body = False, True
        self._cancel_timer()
        # The cycle writes through an outlet, which has every method that a cycle calls.
        outlet = Outlet(self)
        self.cycle.transport = outlet  # type: ignore[assignment]
        self.cycle.on_response = outlet.complete
        if self.probes_only or (self.server_state.draining and not self._has_more_heads()):
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """A piece of the body, for the application."""
        self._framing_bytes = 0
        self._arrived_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is complete."""
        if self._wants_upgrade:
            return
        super().on_message_complete()
        self._in_body = False
        # Some requests are answered before their body has arrived.
        if self.cycle.response_complete and not self._drops_input:
            self._cancel_timer()
            self._wait_for_next()

    def on_response_complete(self) -> None:
        """An answer is written: continue with the next request, or read the rest of the body.

        Unlike uvicorn's, it starts no queued request: here requests wait as bytes.
        """
        self.server_state.total_requests += 1
        if self._drops_input or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        if self._in_body:
            self.flow.resume_reading()
            self._set_timer(self.limits.body_timeout_s, self.end)
        else:
            self._continue()

    # Called by the server.

    def announce_close(self) -> None:
        """Make the last answer that the client waits for say "connection: close".

        If more requests wait as bytes, the answer to the last of those says it.
        """
        if not self._has_more_heads():
            super().announce_close()

    def finish(self) -> None:
        """Close as soon as every request that has arrived is answered.

        The cases, in order:

        1. A request is being answered: its answer announces the end.
        2. The client must read first. The timer of the write buffer limits that time.
        3. A request has begun to arrive: it has the time of a head.
        4. The client has just connected: its first request is waited for.
        5. The connection is idle: it closes.
        """
        if self._drops_input or self.transport.is_closing():
            return
        fresh_s = self._connected_s + _FRESH_S - self.loop.time()
        if self._is_answering():
            self.announce_close()
        elif self.flow.is_held:
            return
        elif self._in_head or self._in_body or self._unread_bytes():
            self._wait_for_head()
        elif self._head_count == 0 and fresh_s > 0:
            self._set_timer(fresh_s, self._finish_when_stale)
        else:
            self._linger(IDLE_LINGER_S)

    def give_up(self) -> None:
        """Close now, with 503 if an answer is due and has not begun."""
        if self._is_answering() and not self.cycle.response_started and not self._drops_input:
            self._disconnect_application()
            self._send_refusal(server_stopped())
        else:
            self._close()

    def evict(self) -> None:
        """Close at once: another connection needs the file descriptor."""
        if not self._drops_input and not self._is_answering():
            self._send_refusal(too_many_connections())
        self._close()

    @property
    def is_silent(self) -> bool:
        """Whether the client has sent nothing yet."""
        return self._head_count == 0 and not self._unread_bytes()

    @property
    def is_ending(self) -> bool:
        """Whether everything is written, and only the end of the client is waited for."""
        return self._drops_input

    # Requests, one at a time.

    def _parse(self) -> None:
        """Feed the parser up to the end of the next request, and hold the rest."""
        received_bytes = len(self._received)
        piece_count = 0
        while self._position < received_bytes and not self._drops_input and not self._must_wait():
            if piece_count == _PIECES_PER_TURN:
                self.flow.hold()
                self.loop.call_soon(self._parse)
                return
            piece_count += 1
            start, end = self._position, self._piece_end()
            self._position = end
            # Most pieces are all that was received: they need no view.
            if end - start == received_bytes:
                self._feed(self._received)
            else:
                self._feed(memoryview(self._received)[start:end])

        if self._drops_input or self.transport.is_closing():
            return
        if self._position < received_bytes:
            self.flow.hold()
            return
        self._received = b""
        self._position = 0
        if self._is_half_closed:
            if not self._must_wait():
                self._refuse_unfinished()
            return
        self.flow.release()
        # What was parsed is part of a head, or empty lines, which may precede a request.
        if not self._in_body and not self._is_answering():
            self._wait_for_head()

    def _must_wait(self) -> bool:
        """Whether the next request must wait for an answer, or for the client to read."""
        return not self._in_body and (self._is_answering() or self.flow.write_paused)

    def _piece_end(self) -> int:
        """The end of the next piece for the parser, as an index: never more than one request.

        A head ends with an empty line, and so does the last chunk of a body; the parser accepts no
        other end. An empty line within a chunk only makes the pieces smaller.
        """
        received, start = self._received, self._position
        if self._in_body and self._unparsed_body_bytes is not None:
            return min(len(received), start + self._unparsed_body_bytes)

        # The empty line may begin in bytes that the parser has already seen.
        if self._tail:
            index = (self._tail + received[start : start + 3]).find(_HEAD_END)
            if index >= 0:
                end = start + index + len(_HEAD_END) - len(self._tail)
                self._tail = b""
                return end

        index = received.find(_HEAD_END, start)
        if index >= 0:
            self._tail = b""
            return index + len(_HEAD_END)
        self._tail = (self._tail + received[max(start, len(received) - 3) :])[-3:]
        return len(received)

    def _feed(self, piece: bytes | memoryview) -> None:
        """Give the parser a piece, and refuse what it cannot read or what is too long."""
        if self._in_body and self._unparsed_body_bytes is not None:
            self._unparsed_body_bytes -= len(piece)
        if self._in_body:
            self._framing_bytes += len(piece)
        else:
            self._framing_bytes = 0

        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            self._ignore_upgrade()
            return
        except httptools.HttpParserError as error:
            # httptools 0.9 wraps what a callback raises in an error of the parser.
            cause = error.__context__
            if isinstance(cause, Refusal):
                self._refuse(cause)
            elif self.is_plain_at_tls:
                self._refuse(tls_required())
            else:
                self._refuse(not_http(error, bytes(piece[:2]), is_first=self._head_count <= 1))
            return

        if self._in_head:
            self._head_bytes += len(piece)
            if self._head_bytes > self.limits.header_bytes:
                self._refuse(head_too_long(self.limits.header_bytes))
        elif self._in_body and self._framing_bytes > self.limits.header_bytes:
            self._refuse(framing_too_long(self.limits.header_bytes))

    def _ignore_upgrade(self) -> None:
        """Parse the head again without its request for another protocol.

        httptools would treat all further bytes as that protocol. But a server may ignore the
        request (RFC 9110, 7.8), and some HTTP/2 clients add it to their first request.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        head = [method, b" ", self.url, b" HTTP/", version, b"\r\n"]
        for name, value in self.headers:
            if name in _UPGRADES:
                continue
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(token for token in tokens if token.lower() not in _UPGRADES)
            head += [name, b": ", value, b"\r\n"]
        head.append(b"\r\n")
        self._wants_upgrade = self._in_head = False
        self.parser = httptools.HttpRequestParser(self)
        # As uvicorn does: a request that announces the end may be followed by bytes.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._feed(b"".join(head))

    def _continue(self) -> None:
        """Parse the next request, once the one before is answered and the client has read."""
        if self._must_wait():
            return
        if self._position < len(self._received):
            self._parse()
            is_parsed = self._position >= len(self._received)
            if self._drops_input or self._in_body or self._must_wait() or not is_parsed:
                return
        if self._is_half_closed:
            self._close()
        else:
            self.flow.resume_reading()
            self._wait_for_next()

    def _has_more_heads(self) -> bool:
        return self._received.find(_HEAD_END, self._position) >= 0

    def _check_for_reset(self, delay_s: float) -> None:
        """Abort if the client has reset the connection. Else check again after `delay_s`.

        The loop does not report it: nothing is read any more from a half-closed connection.
        """
        if self.transport.is_closing() or not hasattr(socket, "TCP_INFO"):
            return
        client = self.transport.get_extra_info("socket")
        if client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE:
            self.transport.abort()
            return
        self._reset_timer = self.loop.call_later(
            delay_s, self._check_for_reset, min(2 * delay_s, _LONGEST_RESET_CHECK_S)
        )

    # Timers, and the end.

    def _wait_for_head(self) -> None:
        if self._timer is None and not self._is_answering():
            self._set_timer(self.limits.header_timeout_s, self._head_is_late)

    def _wait_for_next(self) -> None:
        if self._in_head:
            self._wait_for_head()
        elif self.server_state.stopping:
            self.finish()
        else:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _head_is_late(self) -> None:
        if self.probes_only:
            self._refuse(too_many_connections())
        else:
            self._refuse(head_too_late(self.limits.header_timeout_s))

    def _finish_when_stale(self) -> None:
        self._cancel_timer()
        self.finish()

    def _linger(self, linger_s: float) -> None:
        """Linger, unless the client has already closed its sending side."""
        self._received = b""
        if self._is_half_closed:
            self._close()
            return
        self.flow.release()
        super()._linger(linger_s)
