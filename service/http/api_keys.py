"""API keys: the valid ones, and the middleware that refuses requests without one.

No message and no log line holds a key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from evalmode.service.errors import StartFailed, error_body
from evalmode.service.health import PROBE_PATHS
from evalmode.service.http.cross_site import is_cross_origin
from evalmode.service.settings import Settings

# A shorter key could be guessed.
MIN_CHARACTERS = 16

# A file of keys is read whole, and a wrong path may name something large.
_MAX_FILE_BYTES = 1 << 20

_REREAD_S = 1.0

_log = structlog.get_logger("evalmode.service")


def requires_key(settings: Settings) -> bool:
    """Whether requests need an API key."""
    return settings.api_keys is not None or settings.api_keys_file is not None


class _KeysRefused(ValueError):  # noqa: N818 - like the errors in errors.py
    """Keys that cannot be used. The message is one sentence, and holds none of them."""


class ApiKeys:
    """The valid keys, as sha256 digests. A file of keys is read again at most once a second."""

    def __init__(
        self,
        keys: Iterable[str] = (),
        *,
        file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises StartFailed without any key, for a key that is too short, and for a bad file."""
        self._file = file
        self._clock = clock
        try:
            self._setting_digests = _digests(keys, source="setting api_keys")
        except _KeysRefused as error:
            raise StartFailed(str(error)) from error
        self._content_digest = b""
        self._file_digests: Sequence[bytes] = ()
        if file is not None:
            try:
                self._load(file)
            except (OSError, _KeysRefused) as error:
                raise StartFailed(_file_problem(file, error)) from error
        if not self._setting_digests and not self._file_digests:
            raise StartFailed(
                "setting api_keys holds no key: add one, or remove the setting to serve requests"
                " without a key"
            )
        self._logged_problem: str | None = None
        self._read_at_s = clock()

    @classmethod
    def of(cls, settings: Settings) -> ApiKeys | None:
        """The keys of these settings, or None if requests need no key. Raises StartFailed."""
        if not requires_key(settings):
            return None
        keys: list[str] = []
        if settings.api_keys is not None:
            keys = re.split(r"[\s,]+", settings.api_keys.get_secret_value())
        return cls(filter(None, keys), file=settings.api_keys_file)

    def is_valid(self, key: bytes) -> bool:
        """Whether this is one of the keys. The time does not depend on which one it is."""
        if self._file is not None and self._clock() - self._read_at_s >= _REREAD_S:
            self._read_at_s = self._clock()
            try:
                if self._load(self._file):
                    _log.info("API keys read", file=str(self._file), keys=len(self._file_digests))
                self._logged_problem = None
            except (OSError, _KeysRefused) as error:
                problem = _file_problem(self._file, error)
                # Once for each problem, not once a second.
                if problem != self._logged_problem:
                    _log.error("the API keys stay as they were", reason=problem)
                self._logged_problem = problem
        digest = hashlib.sha256(key).digest()
        valid = False
        # All digests are compared, also after a match.
        for valid_digest in (*self._setting_digests, *self._file_digests):
            valid |= hmac.compare_digest(digest, valid_digest)
        return valid

    def _load(self, file: Path) -> bool:
        """Read the keys of the file; false if it has not changed.

        Raises OSError and _KeysRefused; the keys then stay as they are.
        """
        with file.open("rb") as stream:
            content = stream.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise _KeysRefused(f"it holds more than {_MAX_FILE_BYTES} bytes")
        # The content is compared, not the time stamp, which does not show every change.
        content_digest = hashlib.sha256(content).digest()
        if content_digest == self._content_digest:
            return False
        try:
            lines = content.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            # `from None`, because that error holds the whole file.
            raise _KeysRefused("it is not UTF-8") from None
        # One key a line, without blank lines and comments.
        digests: list[bytes] = []
        for number, line in enumerate(lines, start=1):
            key = line.strip()
            if key and not key.startswith("#"):
                digests += _digests([key], source=f"line {number}")
        if not digests:
            raise _KeysRefused("it holds no key")
        # Without repeated keys, in their order.
        self._file_digests = tuple(dict.fromkeys(digests))
        self._content_digest = content_digest
        return True


def _digests(keys: Iterable[str], *, source: str) -> Sequence[bytes]:
    digests: list[bytes] = []
    for key in keys:
        if len(key) < MIN_CHARACTERS:
            raise _KeysRefused(
                f"{source} holds a key of {len(key)} characters: a key has at least"
                f" {MIN_CHARACTERS}"
            )
        digests.append(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest())
    return tuple(digests)


def _file_problem(file: Path, error: OSError | _KeysRefused) -> str:
    if isinstance(error, OSError):
        reason = error.strerror or error
        return f"setting api_keys_file names {file}, which cannot be read: {reason}"
    return f"setting api_keys_file names {file}: {error}"


class RequireKey:
    """Middleware that answers requests without a valid key with 401, before their body is read.

    A key is sent as `Authorization: Bearer KEY`, as `X-API-Key: KEY`, or as the password of
    `Authorization: Basic`. The last is for browsers, which ask for a password when they open
    `/docs`.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; the start and the end of the application (`lifespan`) need no key."""
        # Probes of an orchestrator have no key, and their routes tell nothing about the models.
        is_probe = scope["type"] == "http" and scope["path"] in PROBE_PATHS
        if scope["type"] == "lifespan" or is_probe:
            await self._app(scope, receive, send)
            return
        keys = _sent_keys(scope)
        if any(self._keys.is_valid(key) for key in keys):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            problem = "the API key is not valid" if keys else "this server needs an API key"
            await _refuse(scope, send, problem)
        else:
            # A websocket: 1008 is the code of a policy violation.
            await send({"type": "websocket.close", "code": 1008})


def header_value(scope: Scope, name: bytes) -> bytes | None:
    """The first header of this name, which is in lower case; None if there is none."""
    for header, value in scope["headers"]:
        if header == name:
            return bytes(value)
    return None


def _sent_keys(scope: Scope) -> list[bytes]:
    """The keys that a request sends: there may be one in each of its headers."""
    keys: list[bytes] = []
    authorization = header_value(scope, b"authorization") or b""
    scheme, _, credentials = authorization.partition(b" ")
    credentials = credentials.strip()
    if scheme.lower() == b"bearer" and credentials:
        keys.append(credentials)
    # A browser adds Basic credentials to requests by itself, also to those that pages of other
    # sites send. These are not requests of its user.
    if scheme.lower() == b"basic" and not is_cross_origin(Headers(scope=scope)):
        try:
            name, _, password = base64.b64decode(credentials, validate=True).partition(b":")
        except binascii.Error:
            name = password = b""
        # `curl -u KEY:` sends the key as the name, without a password.
        key = password or name
        if key:
            keys.append(key)
    api_key = (header_value(scope, b"x-api-key") or b"").strip()
    if api_key:
        keys.append(api_key)
    return keys


async def _refuse(scope: Scope, send: Send, problem: str) -> None:
    body = error_body(
        scope["path"], f"{problem}: send one as Authorization: Bearer KEY or as X-API-Key: KEY"
    )
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", b"Bearer"),
    ]
    if scope["method"] in ("GET", "HEAD"):
        # A browser then asks its user for the key, and the documentation opens. A POST comes from a
        # page that has its own button for the key, and a dialog would cover it.
        headers.append((b"www-authenticate", b'Basic realm="API key as password"'))
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
