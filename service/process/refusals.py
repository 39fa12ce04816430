"""What a connection refuses by itself, the sentence of each refusal, and how it is sent.

A connection refuses bytes that are not an HTTP request, and clients beyond its limits. Such a
refusal has the same form as every other error, and the application never sees the request.

`RefusingProtocol` sends refusals. It uses these private parts of uvicorn 0.54: `STATUS_LINE`, and
`disconnected`, `message_event`, `response_started` and `response_complete` of a request's cycle.
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
    LingeringProtocol,
)
from evalmode.service.settings import setting_named

_RETRY_AFTER_S = 1
# Content type 22 (handshake) and the major version of every TLS since SSL 3.0: RFC 8446, 5.1.
_TLS_HANDSHAKE = b"\x16\x03"
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """The limits of every connection.

    Attributes:
        header_bytes: the longest request head, and the longest framing between chunks of a body.
        header_timeout_s: how long a client may take to send a head.
        body_timeout_s: how long a client may take for the rest of a body that is already answered.
        on_refusal: called with the reason (one of the metrics' REASONS) of every refusal that the
            application does not see.
    """

    header_bytes: int
    header_timeout_s: float
    body_timeout_s: float
    on_refusal: Callable[[str], None]


class Refusal(Exception):  # noqa: N818 - not a failure, but an answer
    """A refusal with its status and sentence. The callbacks of the parser raise it.

    `reason` is one of the metrics' REASONS, or None where the application counts the request.
    """

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
    """The address of a request in a form that uvicorn can split. Most already begin with a slash.

    The parser itself refuses characters that no address may have. Raises Refusal.
    """
    if method == b"CONNECT":
        raise Refusal(400, "CONNECT asks for a tunnel, and this server is no proxy: ask for a path")
    if url.startswith(b"/"):
        return url
    try:
        parts = httptools.parse_url(url)
    except httptools.HttpParserInvalidURLError as error:
        authority = url.partition(b"://")[2].partition(b"/")[0].partition(b"?")[0]
        host, colon, port = authority.rpartition(b":")
        if not colon:
            host = authority
        if not host:
            problem = "names no host"
        elif colon and not (port.isdigit() and int(port[:9]) <= 65_535):
            problem = "has a port that is not a number from 0 to 65535"
        else:
            problem = "is not a URL"
        excerpt = url[:_SHOWN_CHARACTERS].decode("ascii", "backslashreplace")
        raise Refusal(
            400, f"the address {excerpt} {problem}: send a path that begins with /"
        ) from error
    # uvicorn 0.54 fails on an address without a path, such as http://host?query.
    if parts.path is None:
        return b"/" + (b"?" + parts.query if parts.query else b"")
    return url


def body_bytes_of(
    url: bytes, headers: Sequence[tuple[bytes, bytes]], *, version: str, max_head_bytes: int
) -> int | None:
    """The length in bytes of the body that a head declares. None means a body in chunks.

    Raises Refusal for a head of more than `max_head_bytes`, and unless it has exactly one Host
    header (HTTP/1.0 may have none).
    """
    head_bytes, host_count = len(url), 0
    body_bytes: int | None = 0
    for name, value in headers:
        head_bytes += len(name) + len(value) + 4  # the colon, the blank and the line end
        if name == b"host":
            host_count += 1
        elif name == b"content-length":
            body_bytes = int(value)
        elif name == b"transfer-encoding":
            body_bytes = None
    if head_bytes > max_head_bytes:
        raise head_too_long(max_head_bytes)
    if host_count > 1 or (host_count == 0 and version == "1.1"):
        raise Refusal(400, f"a request has one Host header, this one has {host_count}")
    return body_bytes


# The other refusals.


def head_too_long(max_bytes: int) -> Refusal:
    """For a head that is longer than the limit, complete or not."""
    return Refusal(431, f"request line and headers are longer than the {max_bytes} bytes allowed")


def framing_too_long(max_bytes: int) -> Refusal:
    """For a body in chunks with more framing between two pieces of data than the limit."""
    return Refusal(431, f"chunk sizes and trailers are longer than the {max_bytes} bytes allowed")


def head_too_late(limit_s: float) -> Refusal:
    """For a client that sends no head, or an incomplete one, in time."""
    return Refusal(
        408, f"no complete request head arrived within {limit_s:g} s", reason="request_timeout"
    )


def not_http(error: httptools.HttpParserError, first_bytes: bytes, *, is_first: bool) -> Refusal:
    """For input that the parser cannot read.

    `first_bytes` are the first two bytes of it. `is_first` says that they begin the connection.
    """
    if is_first and first_bytes == _TLS_HANDSHAKE:
        return Refusal(400, "this is TLS, and the server speaks plain HTTP here: use http://")
    return Refusal(400, f"this is not HTTP/1.1: {error}")


def tls_required() -> Refusal:
    """For plain text at a port where the server speaks TLS."""
    return Refusal(400, "this port speaks TLS: use https://")


def too_many_connections() -> Refusal:
    """For a request other than a health probe on a connection above the limit."""
    return Refusal(
        503,
        "the server has as many connections as it accepts: retry in"
        f" {_RETRY_AFTER_S} s, or raise {setting_named('max_connections')}",
        reason="too_many_connections",
        retry_after_s=_RETRY_AFTER_S,
    )


def server_stopped() -> Refusal:
    """For a request that is still in flight when the server gives up waiting."""
    return Refusal(503, "the server stopped before this request was answered", reason="not_ready")


class RefusingProtocol(LingeringProtocol):
    """uvicorn's protocol with refusals. A subclass parses the requests and sets `limits`."""

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
        # The declared length of the body. None means a body in chunks.
        self._body_bytes: int | None = 0
        # What has arrived of the body, without the framing of chunks.
        self._arrived_bytes = 0

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse_unfinished(self) -> None:
        """Refuse a request whose client has closed its sending side before the end of the request.

        Between two requests the connection is only closed.
        """
        if self._in_body:
            if self._body_bytes is None:
                problem = (
                    f"the body ends after {_bytes(self._arrived_bytes)}, before its last chunk"
                )
            else:
                problem = f"the body ends after {self._arrived_bytes} of {_bytes(self._body_bytes)}"
            # The application sees that its client has disconnected, and counts the request.
            self._refuse(Refusal(400, problem, reason=None))
        elif self._in_head:
            problem = (
                f"the request head ends after {_bytes(self._head_bytes)}, before its empty line"
            )
            self._refuse(Refusal(400, problem, reason="cancelled"))
        else:
            self._close()

    def _refuse(self, refusal: Refusal) -> None:
        """Send the refusal, unless the application has begun to answer this request."""
        self._cancel_timer()
        if not self._in_body:
            self._send_refusal(refusal)
        elif self.cycle.response_complete:
            self._linger(UNREAD_LINGER_S)
        else:
            self._disconnect_application()
            if self.cycle.response_started:
                self._close()
            else:
                self._send_refusal(refusal)

    def _disconnect_application(self) -> None:
        """Tell the application that its client is gone. uvicorn drops what it still sends."""
        self.cycle.disconnected = True
        self.cycle.message_event.set()

    def _send_refusal(self, refusal: Refusal) -> None:
        if self.transport.is_closing():
            return
        if refusal.reason is not None:
            self.limits.on_refusal(refusal.reason)

        # Errors below /v2 have another form. Without a request the path is empty.
        path = b""
        if self._in_head or self._is_answering():
            path = self.url.partition(b"?")[0]
        body = error_body(path.decode("latin-1"), str(refusal))

        answer = [STATUS_LINE[refusal.status]]
        for name, value in self.server_state.default_headers:
            answer += [name, b": ", value, b"\r\n"]
        if refusal.retry_after_s:
            answer += [b"retry-after: %d\r\n" % refusal.retry_after_s]
        answer += [
            b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            % len(body),
            body,
        ]
        self.transport.write(self.without_sent_prefix(b"".join(answer)))
        self._linger(UNREAD_LINGER_S)


def _bytes(count: int) -> str:
    return "1 byte" if count == 1 else f"{count} bytes"
