"""One HTTP/1.1 connection, within limits: what is slow, too long or no HTTP is refused. Knows no
route and no server.

A client that is slow with a request's head is not waited for; a head that is too long, and what is
not HTTP, is refused in the form that every error here has, in its turn. Slow bodies are the
application's affair: it reads them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from evalmode.service.process.lingering_close import (
    IDLE_LINGER_S,
    UNREAD_LINGER_S,
    Connections,
    EndingProtocol,
    Outlet,
)
from evalmode.service.settings import Settings

# Who connected so recently has a request on its way.
_FRESH_S = 1.0
_UPGRADES = (b"upgrade", b"http2-settings")


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """How long a head may be, and how long a client may take for it, and for reading what was
    written.

    `refused` is told the status of every answer that is given here and never reaches the
    application.
    """

    header_bytes: int
    header_timeout_s: float
    body_timeout_s: float
    refused: Callable[[int], None]


def connection_within(
    settings: Settings, *, refused: Callable[[int], None] = lambda status: None
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


class _Refused(Exception):  # noqa: N818 - an answer on its way out of the parser's callbacks
    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Connection(EndingProtocol):
    """uvicorn's protocol within `limits`; `connection_within` makes a class that has some."""

    limits: ClassVar[ConnectionLimits]

    def __init__(
        self,
        config: Config,
        server_state: Connections,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._in_head = False
        self._heads = 0
        self._head_bytes = 0
        self._upgrading = False
        self._owed: _Refused | None = None  # to be said after the answers that come before it

    # What the transport calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a head."""
        super().connection_made(transport)
        self._made_s = self.loop.time()
        self._wait(self.limits.header_timeout_s, self._head_is_late)

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse what is no HTTP or too long."""
        if self._deaf or self._owed is not None:
            return
        self._unset_keepalive_if_required()
        heads, between = self._heads, not (self._in_head or self._in_body)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on_without_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(
                cause
                if isinstance(cause, _Refused)
                else _Refused(400, f"this is not HTTP/1.1: {error}")
            )
            return
        began = self._heads - heads
        # else it began somewhere within this data
        if self._in_head and (began == 0 or (began == 1 and between)):
            self._head_bytes += len(data)
            if self._head_bytes > self.limits.header_bytes:
                self._refuse(self._too_long())
                return
        # the latter: empty lines, which may stand before a request
        if self._in_head or (between and began == 0):
            self._wait_for_head()

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
        self._in_head = True
        self._heads += 1
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        """Hand a head that is as it should be to the application."""
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._upgrading = True
            return
        self._check_head()
        super().on_headers_complete()
        self._in_head, self._in_body = False, True
        self._wait_no_more()
        outlet = Outlet(self)
        self.cycle.transport = outlet  # type: ignore[assignment]  # it has what a cycle calls
        self.cycle.on_response = outlet.complete
        if self.server_state.draining:
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
        if self._deaf:
            self.server_state.total_requests += 1
            return
        more = bool(self.pipeline)
        super().on_response_complete()
        if more or self.transport.is_closing():
            return
        if self._owed is not None:
            self._say(self._owed)
        elif self._in_body:
            self._unset_keepalive_if_required()
            self._wait(self.limits.body_timeout_s, self.end)
        elif self._in_head or self.server_state.stopping:
            self._unset_keepalive_if_required()
            self._wait_for_next()

    # What the server calls.

    def wind_up(self) -> None:
        """End as soon as everything that was asked is answered; nobody is waited for longer than
        the limits say.
        """
        if self._deaf or self.transport.is_closing():
            return
        if self._answering():
            self.retire()
        elif self._in_head or self._in_body or self._unread():
            self._wait_for_head()
        elif self._heads == 0 and (left_s := self._made_s + _FRESH_S - self.loop.time()) > 0:
            self._wait(left_s, self._fresh_no_more)
        else:
            self._linger(IDLE_LINGER_S)

    def give_up(self) -> None:
        """End now, with 503 where an answer is owed and not begun."""
        self.pipeline.clear()
        if self._answering() and not self.cycle.response_started and not self._deaf:
            self._disown()
            self._say(_Refused(503, "the server stopped before this request was answered"))
        else:
            self._close()

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
            _Refused(408, f"no whole request head came within {self.limits.header_timeout_s:g} s")
        )

    def _fresh_no_more(self) -> None:
        self._wait_no_more()
        self.wind_up()

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # What is refused here.

    def _check_head(self) -> None:
        length_bytes, hosts = len(self.url), 0
        for name, value in self.headers:
            length_bytes += len(name) + len(value) + 4
            hosts += name == b"host"
        if length_bytes > self.limits.header_bytes:
            raise self._too_long()
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):
            raise _Refused(400, f"a request has one Host header, this one has {hosts}")

    def _too_long(self) -> _Refused:
        return _Refused(
            431,
            f"request line and headers are longer than the {self.limits.header_bytes} bytes"
            " allowed",
        )

    def _refuse(self, refused: _Refused) -> None:
        self._wait_no_more()
        if not self._in_body:
            if self._answering():
                self._owed = refused
            else:
                self._say(refused)
        elif self.cycle.response_complete:
            self._linger(UNREAD_LINGER_S)
        elif self.pipeline:  # the request at fault is the newest, and others are answered before it
            self.pipeline.popleft()
            self._owed = refused
        else:
            self._disown()
            if self.cycle.response_started:
                self._close()
            else:
                self._say(refused)

    def _disown(self) -> None:
        """The application is told that its client is gone: what it still says is dropped."""
        self.cycle.disconnected = True
        self.cycle.message_event.set()

    def _say(self, refused: _Refused) -> None:
        if self.transport.is_closing():
            return
        self.limits.refused(refused.status)
        body = json.dumps({"error": str(refused)}).encode()
        head = [STATUS_LINE[refused.status]]
        head += [
            name + b": " + value + b"\r\n" for name, value in self.server_state.default_headers
        ]
        head += [
            b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            % len(body)
        ]
        self.transport.write(b"".join([*head, body]))
        self._linger(UNREAD_LINGER_S)

    def _go_on_without_upgrade(self, rest: bytes) -> None:
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
        self.data_received(b"".join([*head, b"\r\n", rest]))
