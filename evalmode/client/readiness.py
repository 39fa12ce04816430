"""Whether the server of this machine or container is ready: what `evalmode healthcheck` does.

An orchestrator asks every few seconds, often on a fraction of a core. So this module imports the
standard library alone, and `evalmode/__main__.py` runs it without Typer.
"""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalmode.service.process.announcement import (
    Announcement,
    address_variables,
    announcements,
)
from evalmode.terminal import complain

if TYPE_CHECKING:
    import ssl

DEFAULT_TIMEOUT_S = 2.0

_READY_PATH = "/readyz"  # answers without an API key
_MAX_ANSWER_BYTES = 65_536
_EVERY_ADDRESS = {"0.0.0.0": ("127.0.0.1",), "::": ("::1", "127.0.0.1")}


class _Unhealthy(Exception):  # noqa: N818 - read as a sentence
    """The server is not ready; one sentence says why."""


@dataclass(kw_only=True)
class _Target:
    """What is asked: a port of the first of these hosts that takes a connection.

    `origin` says what named the host. `trouble` is what would keep the server from starting, as far
    as its settings show it here.
    """

    hosts: tuple[str, ...]
    port: int
    tls: bool
    path: str = _READY_PATH
    certificate: tuple[str, str] | None = None
    origin: str = "--url"
    trouble: str | None = None

    @property
    def authority(self) -> str:
        """Host and port, as a URL has them."""
        host = self.hosts[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"http{'s' if self.tls else ''}://{self.authority}{self.path}"


def check(url: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> int:
    """Ask a server whether it is ready, and print the answer as one sentence.

    Without `url` the server is found by itself. Returns the exit code: 0 if it is ready, else 1.
    """
    target: _Target | None = None

    def give_up(number: int, frame: object) -> None:
        raise _Unhealthy(f"{target or 'the server'} gave no answer in {timeout_s:g} s")

    earlier = signal.signal(signal.SIGALRM, give_up)
    try:
        # One limit for all steps: a socket's own would start anew with every byte.
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        target = _target_of(url) if url is not None else _find_target()
        state = _ask(target)
        print(f"{target} {state}")
    except _Unhealthy as reason:
        complain(reason)
        return 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    return 0


def _target_of(url: str) -> _Target:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise _Unhealthy(f"--url {url} is not a URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _Unhealthy(f"--url must begin with http:// or https://, got {url}")
    tls = parts.scheme == "https"
    path = parts.path if parts.path.strip("/") else _READY_PATH
    return _Target(hosts=(parts.hostname,), port=port or (443 if tls else 80), tls=tls, path=path)


def _find_target() -> _Target:
    """The server that runs in this environment, or else where this environment would start one."""
    environment = address_variables()
    servers = announcements()
    if 1 in servers:  # the server of this container, also where a script gave it its variables
        return _target_at(servers[1])
    meant = [server for server in servers.values() if server.environment == environment]
    if len(meant) == 1:
        return _target_at(meant[0])
    configured = _configured(environment)
    if len(meant) > 1 and (
        not configured or configured.port not in [server.port for server in meant]
    ):
        addresses = " and ".join(sorted(str(_target_at(server)) for server in meant))
        raise _Unhealthy(f"{len(meant)} servers run here, {addresses}: name one with --url")
    if configured is None:
        raise _Unhealthy("no server was found here, and its port is not set: name it with --url")
    return configured


def _target_at(server: Announcement) -> _Target:
    return _Target(
        hosts=_EVERY_ADDRESS.get(server.host, (server.host,)),
        port=server.port,
        tls=server.tls,
        certificate=server.certificate,
    )


def _configured(environment: dict[str, str]) -> _Target | None:
    """The address that `evalmode serve` would take from the variables and the file they name; None
    where its port is chosen when it starts.
    """
    settings: dict[str, Any] = {}
    origins: dict[str, str] = {}  # what a sentence calls each setting
    if file := environment.get("EVALMODE_CONFIG"):
        import tomllib

        try:
            settings = tomllib.loads(Path(file).read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise _Unhealthy(
                f"the settings file {file} (EVALMODE_CONFIG) cannot be read: {error.strerror}"
            ) from error
        except ValueError as error:
            raise _Unhealthy(
                f"the settings file {file} (EVALMODE_CONFIG) is not valid TOML: {error}"
            ) from error
        origins = {name: f"{file}: {name}" for name in settings}
    for variable, value in os.environ.items():
        if variable.upper().startswith("EVALMODE_"):
            name = variable.upper().removeprefix("EVALMODE_").lower()
            settings[name], origins[name] = value, variable
    port = _port_of(settings.get("port", 8000), origin=origins.get("port", "port"))
    if port == 0:
        return None
    host = str(settings.get("host", "127.0.0.1"))
    trouble = None
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        if name in settings and not Path(str(settings[name])).is_file():
            trouble = f"{origins[name]} names a file that is not here, {settings[name]}"
            break
    return _Target(
        hosts=_EVERY_ADDRESS.get(host, (host,)),
        port=port,
        tls="ssl_certfile" in settings,
        origin=origins.get("host", "host"),
        trouble=trouble,
    )


def _port_of(value: object, *, origin: str) -> int:
    """The port as the server would read it. Raises _Unhealthy, naming what set it."""
    try:
        number = float(str(value))
    except ValueError:
        number = -1.0
    if not (number.is_integer() and 0 <= number <= 65_535):
        raise _Unhealthy(
            f"{origin} must be a port from 0 to 65535, got {value!r}: correct it, or name the"
            " server with --url"
        )
    return int(number)


def _ask(target: _Target) -> str:
    """What the server answers when it is ready. Raises _Unhealthy."""
    answer = b""
    failure: OSError | UnicodeError | None = None
    try:
        with _connected(target) as connection:
            request = (
                f"GET {target.path} HTTP/1.1\r\nhost: {target.authority}\r\n"
                "user-agent: evalmode-healthcheck\r\nconnection: close\r\n\r\n"
            )
            connection.sendall(request.encode())
            while len(answer) < _MAX_ANSWER_BYTES and (part := connection.recv(_MAX_ANSWER_BYTES)):
                answer += part
    except (OSError, UnicodeError) as error:  # the latter: a host whose name no network can have
        failure = error
    refused = failure is None or isinstance(failure, ConnectionResetError | BrokenPipeError)
    # Only an error of TLS has a reason: an alert, or an end where a handshake should be.
    tls_reason = getattr(failure, "reason", None)
    if target.certificate is not None and not answer and (refused or tls_reason):
        # The server took part in a handshake, and refused the certificate that it was shown.
        return "is alive; only a client with a certificate of its authorities can ask for more"
    if isinstance(failure, socket.gaierror | UnicodeError):
        reason = getattr(failure, "strerror", None) or "no network can have this name"
        raise _Unhealthy(
            f"{target} cannot be asked: {target.origin} names a host that cannot be resolved,"
            f" {target.hosts[0]}: {reason}"
        ) from failure
    if failure is not None:
        reason = tls_reason or getattr(failure, "strerror", None) or failure
        if target.trouble is not None:
            reason = f"{reason}; {target.trouble}"
        raise _Unhealthy(f"{target} cannot be asked: {reason}") from failure
    if not answer:
        raise _Unhealthy(f"{target} closes the connection without an answer")
    head, _, body = answer.partition(b"\r\n\r\n")
    version, _, status = head.partition(b"\r\n")[0].partition(b" ")
    if not version.startswith(b"HTTP/1.") or not status[:3].isdigit():
        raise _Unhealthy(f"{target} does not answer in HTTP{'' if target.tls else ': is it TLS?'}")
    if status[:3] != b"200":
        raise _Unhealthy(f"{target} answers {status[:3].decode()}{_reason_in(body)}")
    return "is ready"


def _connected(target: _Target) -> socket.socket:
    """A connection to the first host that takes one."""
    failure: OSError | None = None
    for host in target.hosts:
        try:
            connection = socket.create_connection((host, target.port))
        except OSError as error:
            failure = failure or error
            continue
        target.hosts = (host,)
        if not target.tls:
            return connection
        name = None if ":" in host else host  # an address with a scope is no name
        return _tls_context(target).wrap_socket(connection, server_hostname=name)
    assert failure is not None, "there is a host"
    raise failure


def _tls_context(target: _Target) -> ssl.SSLContext:
    import ssl

    # The certificate names the server as its clients know it, and this address is another one.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if target.certificate is not None:
        # Where one authority signs servers and clients, the server's own certificate will do. One
        # that cannot be read here is not shown, and the server refuses this client.
        with suppress(OSError, ValueError):
            context.load_cert_chain(
                *target.certificate,
                password=lambda: os.environ.get("EVALMODE_SSL_KEYFILE_PASSWORD", ""),
            )
    return context


def _reason_in(body: bytes) -> str:
    import json

    try:
        return f": {json.loads(body)['error']}"
    except (ValueError, KeyError, TypeError):
        return ""
