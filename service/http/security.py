"""API keys, and the requests that need none. Knows no other route, and never logs a key."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from evalmode.service.errors import StartFailed, error_body
from evalmode.service.http.own_pages import is_of_another_site
from evalmode.service.settings import Settings

OPEN_PATHS = frozenset({"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})
MIN_CHARACTERS = 16

_LONGEST_FILE_BYTES = 1 << 20
_REREAD_S = 1.0

_log = structlog.get_logger("evalmode.service")


def wants_key(settings: Settings) -> bool:
    """Whether requests need an API key."""
    return settings.api_keys is not None or settings.api_keys_file is not None


class _Refused(ValueError):  # noqa: N818 - read as a sentence
    """These keys cannot be used; one sentence that shows none of them."""


class ApiKeys:
    """The keys that are known, as digests; those of a file are looked at again every second."""

    def __init__(
        self,
        given: Iterable[str] = (),
        *,
        file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises StartFailed when there is no key, one is too short, or the file cannot be read."""
        self._file = file
        self._clock = clock
        try:
            self._given = tuple(_digests(given, where="setting api_keys"))
            self._seen, self._of_file = _read(file) if file is not None else (b"", ())
        except (OSError, _Refused) as error:
            raise StartFailed(_why(error, file)) from error
        if not self._given and not self._of_file:
            raise StartFailed(
                "setting api_keys holds no key: give one, or leave it out to let everybody ask"
            )
        self._trouble: str | None = None
        self._looked_s = clock()

    @classmethod
    def of(cls, settings: Settings) -> ApiKeys | None:
        """The keys that these settings ask for, or None where everybody may ask. Raises
        StartFailed.
        """
        if not wants_key(settings):
            return None
        given = settings.api_keys.get_secret_value() if settings.api_keys is not None else ""
        return cls(filter(None, re.split(r"[\s,]+", given)), file=settings.api_keys_file)

    def knows(self, shown: bytes) -> bool:
        """Whether this is one of the keys; takes as long whichever it is."""
        self._look()
        digest = hashlib.sha256(shown).digest()
        known = False
        for key in (
            *self._given,
            *self._of_file,
        ):  # all of them: which one it was, and where, must not show in the time
            known |= hmac.compare_digest(digest, key)
        return known

    def _look(self) -> None:
        if self._file is None or self._clock() - self._looked_s < _REREAD_S:
            return
        self._looked_s = self._clock()
        try:
            # Read whole each time: it is small, and a time stamp does not tell every change.
            seen, keys = _read(self._file, known=self._seen)
        except (OSError, _Refused) as error:
            trouble = _why(error, self._file)
            if trouble != self._trouble:
                _log.error("the API keys stay as they were", reason=trouble)
            self._trouble = trouble
            return
        self._trouble = None
        if seen != self._seen:
            self._seen, self._of_file = seen, keys or self._of_file
            _log.info("API keys read", file=str(self._file), keys=len(self._of_file))


def _read(file: Path, *, known: bytes = b"") -> tuple[bytes, tuple[bytes, ...]]:
    """A digest of the file and those of its keys; no keys where the file is the `known` one."""
    with file.open("rb") as opened:
        content = opened.read(_LONGEST_FILE_BYTES + 1)
    if len(content) > _LONGEST_FILE_BYTES:
        raise _Refused(f"it holds more than {_LONGEST_FILE_BYTES} bytes")
    seen = hashlib.sha256(content).digest()
    if seen == known:
        return seen, ()
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise _Refused("it is not UTF-8") from None  # that error holds the whole file
    keys: dict[bytes, None] = {}
    for number, line in enumerate(lines, start=1):
        key = line.strip()
        if key and not key.startswith("#"):
            keys.update(dict.fromkeys(_digests([key], where=f"line {number}")))
    if not keys:
        raise _Refused("it holds no key")
    return seen, tuple(keys)


def _digests(keys: Iterable[str], *, where: str) -> Iterable[bytes]:
    for key in keys:
        if len(key) < MIN_CHARACTERS:
            raise _Refused(
                f"{where} holds a key of {len(key)} characters: a key has at least {MIN_CHARACTERS}"
            )
        yield hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _why(error: Exception, file: Path | None) -> str:
    if isinstance(error, OSError):
        return (
            f"setting api_keys_file names {file}, which cannot be read: {error.strerror or error}"
        )
    return (
        str(error)
        if str(error).startswith("setting")
        else f"setting api_keys_file names {file}: {error}"
    )


class RequireKey:
    """Lets requests with a known key through and answers the others with 401, unread.

    A key is sent as `Authorization: Bearer KEY`, as `X-API-Key: KEY`, or as the password of
    `Authorization: Basic`. The last is for browsers, which ask for it when they open `/docs`.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; what is no request, as the start and the end of the server, goes
        through.
        """
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN_PATHS):
            await self._app(scope, receive, send)
            return
        shown = _shown(scope)
        if any(self._keys.knows(key) for key in shown):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await _refuse(scope, send, known=bool(shown))
        else:
            await send({"type": "websocket.close", "code": 1008})


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of this name, in small letters."""
    for given, value in scope["headers"]:
        if given == name:
            return bytes(value)
    return None


def _shown(scope: Scope) -> list[bytes]:
    shown = []
    scheme, _, credentials = (header(scope, b"authorization") or b"").partition(b" ")
    credentials = credentials.strip()
    if scheme.lower() == b"bearer" and credentials:
        shown.append(credentials)
    # A browser adds Basic credentials by itself, also to requests of other sites' pages: these are
    # not its user's.
    if scheme.lower() == b"basic" and not is_of_another_site(Headers(scope=scope)):
        shown += _of_basic(credentials)
    if key := (header(scope, b"x-api-key") or b"").strip():
        shown.append(key)
    return shown


def _of_basic(credentials: bytes) -> list[bytes]:
    """The password, or the name where there is no password, as `curl -u KEY:` sends it."""
    try:
        name, _, password = base64.b64decode(credentials, validate=True).partition(b":")
    except binascii.Error:
        return []
    return [password or name] if password or name else []


async def _refuse(scope: Scope, send: Send, *, known: bool) -> None:
    sentence = (
        "the API key is not known to this server" if known else "this server wants an API key"
    )
    body = error_body(
        scope["path"], f"{sentence}: send it as Authorization: Bearer KEY or as X-API-Key: KEY"
    )
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", b"Bearer"),
    ]
    if scope["method"] in ("GET", "HEAD"):
        # A browser asks its user for it, and the page of the documentation opens. On a POST it
        # would open its dialog over a page that has a button for the key.
        headers.append((b"www-authenticate", b'Basic realm="API key as password"'))
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
