"""What a connection refuses, the sentence of each refusal, and how it is sent.

A refusal is given here for what is no request, or for a client beyond the limits of its connection.
It has the form of every other error, and it never reaches the application.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from evalmode.service.errors import error_body
from evalmode.service.process.lingering_close import (
    UNREAD_LINGER_S,
    Connections,
    EndingProtocol,
)
from evalmode.service.settings import setting_named

_RETRY_AFTER_S = 1
_TLS_HANDSHAKE = b"\x16\x03"
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """How long a head may be, and how long a client may take for it, and for reading what was
    written.

    `refused` is called with the reason (one of the metrics' REASONS) of every answer that is given
    here and never reaches the application.
    """

    header_bytes: int
    header_timeout_s: float
    body_timeout_s: float
    refused: Callable[[str], None]


class Refused(Exception):  # noqa: N818 - an answer on its way out of the parser's callbacks
    """A refusal. `reason` is one of the metrics' REASONS; None where the application counts it."""

    def __init__(
        self,
        status: int,
        sentence: str,
        *,
        reason: str | None = "invalid",
        retry_after_s: int = 0,
    ) -> None:
        super().__init__(sentence)
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s


# The address and the head of a request.


def path_of(url: bytes, *, method: bytes) -> bytes:
    """The address as uvicorn can take it apart; most begin with a slash and are right.

    The parser itself refuses characters that no address may have. Raises Refused.
    """
    if method == b"CONNECT":
        raise Refused(400, "CONNECT asks for a tunnel, and this server is no proxy: ask for a path")
    if url.startswith(b"/"):
        return url
    try:
        parts = httptools.parse_url(url)
    except httptools.HttpParserInvalidURLError as error:
        shown = url[:_SHOWN_CHARACTERS].decode("ascii", "backslashreplace")
        authority = url.partition(b"://")[2].partition(b"/")[0].partition(b"?")[0]
        host, colon, port = authority.rpartition(b":")
        if not (host if colon else authority):
            problem = "names no host"
        elif colon and not (port.isdigit() and int(port[:9]) <= 65_535):
            problem = "has a port that is not a number from 0 to 65535"
        else:
            problem = "is not a URL"
        raise Refused(
            400, f"the address {shown} {problem}: send a path that begins with /"
        ) from error
    if parts.path is None:
        return b"/" + (b"?" + parts.query if parts.query else b"")
    return url


def body_bytes_of(
    url: bytes, headers: Sequence[tuple[bytes, bytes]], *, version: str, most_bytes: int
) -> int | None:
    """The length of the body that a head announces; None for one in chunks.

    Raises Refused for a head of more than `most_bytes`, and for one without a Host or with several.
    """
    length_bytes, hosts = len(url), 0
    body_bytes: int | None = 0
    for name, value in headers:
        length_bytes += len(name) + len(value) + 4
        if name == b"host":
            hosts += 1
        elif name == b"content-length":
            body_bytes = int(value)
        elif name == b"transfer-encoding":
            body_bytes = None
    if length_bytes > most_bytes:
        raise head_too_long(most_bytes)
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        raise Refused(400, f"a request has one Host header, this one has {hosts}")
    return body_bytes


# Everything else that is refused.


def head_too_long(most_bytes: int) -> Refused:
    """For a head that is longer than the limit, whether it ends or not."""
    return Refused(431, f"request line and headers are longer than the {most_bytes} bytes allowed")


def framing_too_long(most_bytes: int) -> Refused:
    """For a body whose chunks hold next to nothing."""
    return Refused(431, f"chunk sizes and trailers are longer than the {most_bytes} bytes allowed")


def head_too_late(limit_s: float) -> Refused:
    """For a client that sends no head, or one that has no end."""
    return Refused(
        408, f"no whole request head came within {limit_s:g} s", reason="request_timeout"
    )


def no_http(error: httptools.HttpParserError, first: bytes, *, is_first: bool) -> Refused:
    """For what the parser cannot read. `first` are two bytes of it; `is_first` says that nothing
    came before.
    """
    if is_first and first == _TLS_HANDSHAKE:
        return Refused(400, "this is TLS, and the server speaks plain HTTP here: use http://")
    return Refused(400, f"this is not HTTP/1.1: {error}")


def tls_here() -> Refused:
    """For plain text at a port where the server speaks TLS."""
    return Refused(400, "this port speaks TLS: use https://")


def too_many_connections() -> Refused:
    """For a connection above the limit that asks for more than health."""
    return Refused(
        503,
        "the server has as many connections as it takes: retry in"
        f" {_RETRY_AFTER_S} s, or raise {setting_named('max_connections')}",
        reason="too_many_connections",
        retry_after_s=_RETRY_AFTER_S,
    )


def stopped() -> Refused:
    """For a request that is in flight when the time of the server is over."""
    return Refused(503, "the server stopped before this request was answered", reason="not_ready")


class RefusingProtocol(EndingProtocol):
    """uvicorn's protocol with refusals. A class of it parses requests, and has `limits`."""

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
        self._head_bytes = 0
        self._body_bytes: int | None = 0  # of the body; None: it comes in chunks
        self._arrived_bytes = 0  # of the body, without the framing of chunks

    def _refuse_unfinished(self) -> None:
        """Refuse a request of which nothing more will come; where none has begun, only close."""
        if self._in_body:
            if self._body_bytes is None:
                end = f"the body ends after {_bytes(self._arrived_bytes)}, before its last chunk"
            else:
                end = f"the body ends after {self._arrived_bytes} of {_bytes(self._body_bytes)}"
            # Its application notes that the client hung up, and counts it.
            self._refuse(Refused(400, end, reason=None))
        elif self._in_head:
            end = f"the request head ends after {_bytes(self._head_bytes)}, before its empty line"
            self._refuse(Refused(400, end, reason="cancelled"))
        else:
            self._close()

    def _refuse(self, refused: Refused) -> None:
        self._wait_no_more()
        if not self._in_body:
            self._say(refused)
        elif self.cycle.response_complete:
            self._linger(UNREAD_LINGER_S)
        else:
            self._disown()
            if self.cycle.response_started:
                self._close()
            else:
                self._say(refused)

    def _disown(self) -> None:
        """Tell the application that its client is gone: what it still says is dropped."""
        self.cycle.disconnected = True
        self.cycle.message_event.set()

    def _say(self, refused: Refused) -> None:
        if self.transport.is_closing():
            return
        if refused.reason is not None:
            self.limits.refused(refused.reason)
        is_asked = self.cycle is not None and not self.cycle.response_complete
        path = self.url.partition(b"?")[0] if self._in_head or is_asked else b""
        body = error_body(path.decode("latin-1"), str(refused))
        head = [STATUS_LINE[refused.status]]
        head += [
            name + b": " + value + b"\r\n" for name, value in self.server_state.default_headers
        ]
        if refused.retry_after_s:
            head += [b"retry-after: %d\r\n" % refused.retry_after_s]
        head += [
            b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            % len(body)
        ]
        self.transport.write(self.without_beginning(b"".join([*head, body])))
        self._linger(UNREAD_LINGER_S)


def _bytes(count: int) -> str:
    return "1 byte" if count == 1 else f"{count} bytes"
