"""Lines answered by a server: `POST /v1/predict` as ndjson, asked again where asking again may
help. Knows no file.

A chunk that was answered in part is asked for the rest alone: answers do not depend on what is
asked beside them.
"""

from __future__ import annotations

import asyncio
import random
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from evalmode.errors import EvalmodeError
from evalmode.service.ndjson import DIGEST_HEADER, MEDIA_TYPE, Splitter

_TRY_AGAIN = frozenset({408, 429, 502, 503, 504})

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_LONGEST_RETRY_AFTER_S = 120.0
_TIMEOUTS = httpx.Timeout(120.0, connect=10.0, pool=None)
_MAX_ANSWER_BYTES = 16 << 20

_INDEX = re.compile(rb'\{"index":(\d+)(?=[,}])')


class _Again(Exception):  # noqa: N818
    """A try that failed where another may not; `wait_s` is what the server asked for."""

    def __init__(self, why: str, *, wait_s: float | None = None) -> None:
        super().__init__(why)
        self.wait_s = wait_s


@dataclass(frozen=True, kw_only=True)
class RemoteServer:
    """A server that answers lines. `sleep` waits between tries, for so many seconds."""

    client: httpx.AsyncClient
    query: dict[str, str]
    retries: int
    sleep: Callable[[float], Awaitable[None]] = field(default=asyncio.sleep)

    @property
    def name(self) -> str:
        """Its address as a sentence shows it: a user and a password in it are nobody's affair."""
        return str(self.client.base_url.copy_with(userinfo=b"")).rstrip("/")

    async def answer(self, lines: Sequence[bytes], *, first: int) -> tuple[list[bytes], str]:
        """The answers of `lines`, numbered from `first`, and the digest of the model that gave
        them.
        """
        answers: list[bytes] = []
        digests: list[str] = []
        tries = 0
        while True:
            answered = len(answers)
            try:
                await self._ask(lines[answered:], first + answered, answers, digests)
                return answers, digests[0]
            except _Again as failure:
                tries = 1 if len(answers) > answered else tries + 1
                if tries > self.retries:
                    raise EvalmodeError(
                        f"{self.name} did not answer in {tries} tries: {failure}"
                    ) from failure
                await self.sleep(waiting_s(tries, failure.wait_s))

    async def _ask(
        self, lines: Sequence[bytes], first: int, answers: list[bytes], digests: list[str]
    ) -> None:
        """One try: what is answered stands in `answers` even when the rest is not."""
        try:
            async with self.client.stream(
                "POST",
                "/v1/predict",
                params=self.query,
                content=b"\n".join(lines) + b"\n",
                headers={"content-type": MEDIA_TYPE},
            ) as response:
                await self._check(response)
                digests.append(_digest_of(response, digests))
                before = len(answers)
                await _take(response, first, len(lines), answers)
        except httpx.TransportError as error:  # refused, cut, timed out
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                why = f"{self.name} shows no certificate of an authority that is known here"
                raise EvalmodeError(f"{why} (--ca FILE names one): {error}") from error
            raise _Again(str(error) or type(error).__name__) from error
        if len(answers) - before < len(lines):
            raise _Again("it ended its answer early")

    async def _check(self, response: httpx.Response) -> None:
        if response.status_code == 200:
            if response.headers.get("content-type", "").partition(";")[0] != MEDIA_TYPE:
                raise EvalmodeError(f"{self.name} does not answer as an evalmode server does")
            return
        sentence = _sentence((await response.aread())[:4096])
        why = (
            f"{response.status_code} {response.reason_phrase}{f', {sentence}' if sentence else ''}"
        )
        if response.status_code in _TRY_AGAIN:
            raise _Again(why, wait_s=retry_after_s(response.headers.get("retry-after")))
        raise EvalmodeError(f"{self.name} refused: {why}")


def open_client(
    url: str, *, api_key: str | None, ca: Path | None, connections: int
) -> httpx.AsyncClient:
    """A client of the server at `url`. Raises EvalmodeError for an address or a file of authorities
    that is none.
    """
    try:
        parsed = httpx.URL(url.rstrip("/"))
    except httpx.InvalidURL as error:
        raise EvalmodeError(f"--url {url} is no address: {error}") from error
    if parsed.port is not None and parsed.port > 65_535:
        raise EvalmodeError(f"--url {url} is no address: a port is at most 65535")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise EvalmodeError(f"--url must begin with http:// or https://, got {url}")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise EvalmodeError("the API key holds a character that no header may hold")
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
        headers={} if api_key is None else {"authorization": f"Bearer {api_key}"},
        timeout=_TIMEOUTS,
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        verify=verify,
    )


def waiting_s(tries: int, asked_s: float | None) -> float:
    """Seconds before the next try: what the server asked for, else twice as long each time; never
    all at once.
    """
    if asked_s is not None:
        return asked_s + random.uniform(0, 0.5)
    longest_s: float = _FIRST_WAIT_S * 2.0 ** min(tries - 1, 10)
    return min(_LONGEST_WAIT_S, longest_s) * random.uniform(0.5, 1.0)


def retry_after_s(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date, within reason; None
    where it says none.
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


async def _take(response: httpx.Response, first: int, count: int, answers: list[bytes]) -> None:
    """Add the answers as they come, up to `count`, numbered from `first`; a line that is none ends
    them.
    """
    splitter = Splitter(max_line_bytes=_MAX_ANSWER_BYTES)
    taken = 0
    async for chunk in response.aiter_bytes():
        for line in splitter.feed(chunk):
            index = _INDEX.match(line or b"")
            if line is None or index is None or int(index[1]) != taken or taken == count:
                raise _Again(_sentence(line or b"") or "it answered something else than was asked")
            answers.append(b'{"index":%d' % (first + taken) + line[index.end() :] + b"\n")
            taken += 1


def _digest_of(response: httpx.Response, digests: Sequence[str]) -> str:
    digest = response.headers.get(DIGEST_HEADER)
    if digest is None:
        raise EvalmodeError(
            "the server does not say which model answers: it is not an evalmode server"
        )
    if digests and digest != digests[0]:
        raise EvalmodeError(
            f"the server changed its model in the middle, from {digests[0][:16]} to {digest[:16]}"
        )
    return str(digest)


def _sentence(body: bytes) -> str:
    """What an error answer of the server says, if it is one."""
    import json

    try:
        return " ".join(str(json.loads(body)["error"]).split())
    except (ValueError, KeyError, TypeError):
        return ""
