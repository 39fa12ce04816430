"""Answers lines with a server: `POST /v1/predict` as ndjson, with retries.

The answer to a line depends on that line alone. So when a stream breaks, the answers so far are
valid, and the next try sends only the other lines.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from evalmode.errors import EvalmodeError
from evalmode.service.ndjson import DIGEST_HEADER, MEDIA_TYPE, Splitter

# Request timeout, too many requests, bad gateway, unavailable, gateway timeout: a later try may
# succeed.
_RETRIED_STATUSES = frozenset({408, 429, 502, 503, 504})

# The wait after the first failure, which doubles with each further one, and its limit.
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0

# A longer Retry-After is cut: an hour, which a proxy may send during maintenance, would look like a
# hang.
_LONGEST_RETRY_AFTER_S = 120.0

# Two minutes without a byte count as a broken connection. There is a connection for each of the
# requests at once, so the wait for a free one needs no limit.
_TIMEOUTS = httpx.Timeout(120.0, connect=10.0, pool=None)

# The most bytes of one line in a response. A longer line fails the try.
_MAX_ANSWER_BYTES = 16 << 20
# Only this many bytes of an error response are parsed, because they become part of a sentence.
_MAX_ERROR_BYTES = 4096

# How an answer begins.
_INDEX = re.compile(rb'\{"index":(\d+)(?=[,}])')


class _TryFailed(Exception):  # noqa: N818 - never leaves this module
    """One try failed and another may succeed; `retry_after_s` is what the server asked for."""

    def __init__(self, reason: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True)
class RemoteServer:
    """A server that answers lines; the counterpart of `local.LocalModel`.

    `query` is sent with each request. `sleep` waits between tries, for a number of seconds.
    """

    client: httpx.AsyncClient
    query: dict[str, str]
    retries: int
    sleep: Callable[[float], Awaitable[None]] = field(default=asyncio.sleep)

    @property
    def name(self) -> str:
        """The server's address for messages, without a user name and a password."""
        return str(self.client.base_url.copy_with(userinfo=b"")).rstrip("/")

    async def answer(self, lines: Sequence[bytes], *, first: int) -> tuple[list[bytes], str]:
        """The answers to `lines`, numbered from `first`, and the digest of the model.

        Each answer is one line of JSON with its line end. Raises EvalmodeError if the server
        refuses, if it changes its model between two tries, or if more than `retries` tries in a row
        bring no answer.
        """
        answers: list[bytes] = []
        digest: str | None = None
        tries = 0
        while True:
            answered = len(answers)
            try:
                async with self._post(lines[answered:]) as response:
                    # A later try may reach another process, or a server that has swapped its model.
                    response_digest = response.headers.get(DIGEST_HEADER)
                    if response_digest is None:
                        raise EvalmodeError(
                            "the server does not say which model answers: it is not an evalmode"
                            " server"
                        )
                    if digest is not None and response_digest != digest:
                        raise EvalmodeError(
                            "the server changed its model in the middle, from"
                            f" {digest[:16]} to {response_digest[:16]}"
                        )
                    digest = str(response_digest)

                    async for rest in _answers_in(response, count=len(lines) - answered):
                        # The server numbers the lines of each request from 0.
                        index = first + len(answers)
                        answers.append(b'{"index":%d' % index + rest + b"\n")
                if len(answers) < len(lines):
                    raise _TryFailed("it ended its answer early")
                return answers, digest
            except _TryFailed as failure:
                # A new answer is progress: only tries without one count as failures in a row.
                tries = 1 if len(answers) > answered else tries + 1
                if tries > self.retries:
                    raise EvalmodeError(
                        f"{self.name} did not answer in {tries} tries: {failure}"
                    ) from failure
                await self.sleep(backoff_s(tries, failure.retry_after_s))

    @asynccontextmanager
    async def _post(self, lines: Sequence[bytes]) -> AsyncIterator[httpx.Response]:
        """Send `lines`, and yield the response before its body is read.

        Raises _TryFailed for a temporary failure, including a connection that breaks while the body
        is read. Raises EvalmodeError for any other failure.
        """
        try:
            async with self.client.stream(
                "POST",
                "/v1/predict",
                params=self.query,
                content=b"\n".join(lines) + b"\n",
                headers={"content-type": MEDIA_TYPE},
            ) as response:
                if response.status_code != 200:
                    reason = f"{response.status_code} {response.reason_phrase}"
                    sentence = _error_in((await response.aread())[:_MAX_ERROR_BYTES])
                    if sentence:
                        reason = f"{reason}, {sentence}"
                    if response.status_code not in _RETRIED_STATUSES:
                        raise EvalmodeError(f"{self.name} refused: {reason}")
                    retry_after_s = parse_retry_after(response.headers.get("retry-after"))
                    raise _TryFailed(reason, retry_after_s=retry_after_s)

                if response.headers.get("content-type", "").partition(";")[0] != MEDIA_TYPE:
                    raise EvalmodeError(f"{self.name} does not answer as an evalmode server does")
                yield response
        except httpx.TransportError as error:  # connection refused, reset, or timed out
            # The next try would get the same certificate. httpx 0.28 has no class for this error.
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise EvalmodeError(
                    f"{self.name} shows no certificate of an authority that is known here (--ca"
                    f" FILE names one): {error}"
                ) from error
            raise _TryFailed(str(error) or type(error).__name__) from error


@asynccontextmanager
async def connect(
    url: str,
    *,
    model: str | None,
    top_k: int,
    truncate: bool,
    api_key: str | None,
    ca: Path | None,
    connections: int,
    retries: int,
) -> AsyncIterator[RemoteServer]:
    """The server at `url` as a context, which closes its connections.

    `model` is NAME or NAME/VERSION; None is the server's default model. `connections` is the number
    of requests at once. Nothing is sent before the first `answer`.

    Raises EvalmodeError for a URL, a key or a file that cannot be used.
    """
    query = {"top_k": str(top_k), "truncate": str(truncate).lower()}
    name, _, version = (model or "").partition("/")
    if name:
        query["model"] = name
    if version:
        query["version"] = version
    async with open_client(url, api_key=api_key, ca=ca, connections=connections) as client:
        yield RemoteServer(client=client, query=query, retries=retries)


def open_client(
    url: str, *, api_key: str | None, ca: Path | None, connections: int
) -> httpx.AsyncClient:
    """An HTTP client of the server at `url`.

    Raises EvalmodeError for a URL, a key or a file of authorities that cannot be used.
    """
    try:
        parsed = httpx.URL(url.rstrip("/"))
    except httpx.InvalidURL as error:
        raise EvalmodeError(f"--url {url} is not a URL: {error}") from error
    if parsed.port is not None and parsed.port > 65_535:
        raise EvalmodeError(f"--url {url} is not a URL: a port is at most 65535")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise EvalmodeError(f"--url must begin with http:// or https://, got {url}")

    headers = {}
    if api_key is not None:
        if not (api_key.isascii() and api_key.isprintable()):
            raise EvalmodeError(
                "the API key has a character that is not allowed in an HTTP header: use printable"
                " ASCII"
            )
        headers["authorization"] = f"Bearer {api_key}"

    verify: ssl.SSLContext | bool = True
    if ca is not None:
        try:
            verify = ssl.create_default_context(cafile=ca)
        except OSError as error:
            raise EvalmodeError(
                f"--ca {ca} cannot be read as certificates: {error.strerror or error}"
            ) from error

    return httpx.AsyncClient(
        base_url=parsed,
        headers=headers,
        timeout=_TIMEOUTS,
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        verify=verify,
    )


def backoff_s(tries: int, retry_after_s: float | None) -> float:
    """Seconds to wait after `tries` failures in a row.

    It is what the server asked for, or else doubles with each failure. A random part keeps clients
    that failed together from retrying together.
    """
    if retry_after_s is not None:
        return retry_after_s + random.uniform(0, 0.5)
    # With the exponent 10 the wait is at its limit already; without one the power would overflow.
    longest_s: float = _FIRST_WAIT_S * 2.0 ** min(tries - 1, 10)
    return min(_LONGEST_WAIT_S, longest_s) * random.uniform(0.5, 1.0)


def parse_retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date, up to a limit.

    None without a header, and for one that is neither.
    """
    if header is None:
        return None
    try:
        if header.strip().isdecimal():
            wait_s = float(header)
        else:
            wait_s = parsedate_to_datetime(header).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return min(_LONGEST_RETRY_AFTER_S, max(0.0, wait_s))


async def _answers_in(response: httpx.Response, *, count: int) -> AsyncIterator[bytes]:
    """At most `count` answers as they arrive, each without its index and its line end.

    Raises _TryFailed for a line that is not the next answer. For example, a server that stops sends
    an error as its last line.
    """
    splitter = Splitter(max_line_bytes=_MAX_ANSWER_BYTES)
    number = 0
    async for chunk in response.aiter_bytes():
        for line in splitter.feed(chunk):
            index = _INDEX.match(line or b"")
            if line is None or index is None or int(index[1]) != number or number == count:
                raise _TryFailed(
                    _error_in(line or b"") or "a line of its response is not the next answer"
                )
            yield line[index.end() :]
            number += 1


def _error_in(body: bytes) -> str:
    """The sentence in the server's error response; empty for any other body."""
    try:
        return " ".join(str(json.loads(body)["error"]).split())
    except (ValueError, KeyError, TypeError):
        return ""
