"""`evalmode healthcheck`: asks the server of this machine or container whether it is ready.

Without --url the server is, in this order:
1. process 1, if it is a server: the server of this container;
2. the one server that was started in the same environment;
3. the address that `evalmode serve` would listen on in this environment.

An orchestrator asks every few seconds, often on a fraction of a core. So this module imports only
the standard library, and `evalmode/__main__.py` runs it without Typer.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalmode.service.process.announcement import (
    Announcement,
    address_variables,
    announcements,
)
from evalmode.terminal import print_error

DEFAULT_TIMEOUT_S = 2.0

_READY_PATH = "/readyz"  # answers without an API key
_MAX_RESPONSE_BYTES = 65_536

# The addresses at which a server that listens on all addresses is asked.
_LOCAL_HOSTS = {"0.0.0.0": ("127.0.0.1",), "::": ("::1", "127.0.0.1")}


class _Unhealthy(Exception):  # noqa: N818 - never leaves this module
    """The server is not ready; the message is one sentence that says why."""


@dataclass(kw_only=True)
class _Target:
    """The server to ask. The first of `hosts` that accepts a connection becomes the only one.

    Attributes:
        tls: whether the server speaks TLS.
        certificate: the files of the server's certificate and key. A server that demands client
            certificates may accept its own.
        origin: the flag, variable or setting that names the host, for messages.
        settings_problem: a setting with which the server cannot start, as a sentence; else None.
    """

    hosts: tuple[str, ...]
    port: int
    tls: bool
    path: str = _READY_PATH
    certificate: tuple[str, str] | None = None
    origin: str = "--url"
    settings_problem: str | None = None

    @property
    def authority(self) -> str:
        """Host and port, as they stand in a URL."""
        host = self.hosts[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def __str__(self) -> str:
        scheme = "https" if self.tls else "http"
        return f"{scheme}://{self.authority}{self.path}"


def check(url: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> int:
    """Ask a server whether it is ready, and print its state as one sentence.

    Returns the exit code: 0 if it is ready, else 1.
    """
    target: _Target | None = None

    def give_up(number: int, frame: object) -> None:
        raise _Unhealthy(f"{target or 'the server'} gave no answer in {timeout_s:g} s")

    previous_handler = signal.signal(signal.SIGALRM, give_up)
    try:
        # An alarm is one limit for all steps. The timeout of a socket starts again with each byte.
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        target = _target_of_url(url) if url is not None else _find_target()
        state = _ask(target)
        print(f"{target} {state}")
    except _Unhealthy as reason:
        print_error(reason)
        return 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)
    return 0


def _target_of_url(url: str) -> _Target:
    """The server at `--url`, at the path of the readiness check if the URL has none."""
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
    """The server to ask without --url, by the three steps of the module's docstring."""

    def target_of(server: Announcement) -> _Target:
        return _Target(
            hosts=_LOCAL_HOSTS.get(server.host, (server.host,)),
            port=server.port,
            tls=server.tls,
            certificate=server.certificate,
        )

    environment = address_variables()
    servers = announcements()
    # Step 1, whatever its environment: a script that is the container's entry point may have set
    # variables that this process does not have.
    if 1 in servers:
        return target_of(servers[1])

    # Step 2.
    candidates = [server for server in servers.values() if server.environment == environment]
    if len(candidates) == 1:
        return target_of(candidates[0])

    # Step 3, which also chooses between several servers of this environment.
    configured = _configured_target(environment)
    if len(candidates) > 1:
        ports = [server.port for server in candidates]
        if configured is None or configured.port not in ports:
            addresses = " and ".join(sorted(str(target_of(server)) for server in candidates))
            raise _Unhealthy(
                f"{len(candidates)} servers run here, {addresses}: name one with --url"
            )
    if configured is None:
        raise _Unhealthy("no server was found here, and its port is not set: name it with --url")
    return configured


def _configured_target(environment: dict[str, str]) -> _Target | None:
    """The address that `evalmode serve` would take from its variables and its settings file.

    None for port 0, which is chosen at the start.
    """
    settings: dict[str, Any] = {}
    # The variable or the line of the file that each setting comes from, for messages.
    origins: dict[str, str] = {}
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

    # The port as the server reads it: pydantic accepts "8000.0" and " 8000 " too.
    port_setting = settings.get("port", 8000)
    try:
        port = float(str(port_setting))
    except ValueError:
        port = -1.0
    if not (port.is_integer() and 0 <= port <= 65_535):
        raise _Unhealthy(
            f"{origins.get('port', 'port')} must be a port from 0 to 65535, got {port_setting!r}:"
            " correct it, or name the server with --url"
        )
    if port == 0:
        return None

    settings_problem = None
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        if name in settings and not Path(str(settings[name])).is_file():
            settings_problem = f"{origins[name]} names a file that is not here, {settings[name]}"
            break
    host = str(settings.get("host", "127.0.0.1"))
    return _Target(
        hosts=_LOCAL_HOSTS.get(host, (host,)),
        port=int(port),
        tls="ssl_certfile" in settings,
        origin=origins.get("host", "host"),
        settings_problem=settings_problem,
    )


def _ask(target: _Target) -> str:
    """Send one request and return the state of a healthy server. Raises _Unhealthy for any other.

    1. A server that demands a client certificate, and closes this connection without one, is alive.
    2. A connection that fails, or an answer that is not HTTP, is unhealthy.
    3. The status 200 is ready. Another status is unhealthy, with the reason in the body.
    """
    response = b""
    failure: OSError | UnicodeError | None = None
    try:
        with _connect(target) as connection:
            request = (
                f"GET {target.path} HTTP/1.1\r\nhost: {target.authority}\r\n"
                "user-agent: evalmode-healthcheck\r\nconnection: close\r\n\r\n"
            )
            connection.sendall(request.encode())
            while len(response) < _MAX_RESPONSE_BYTES:
                part = connection.recv(_MAX_RESPONSE_BYTES)
                if not part:
                    break
                response += part
    # Python raises UnicodeError for a host that cannot be a name, such as `a..b`.
    except (OSError, UnicodeError) as error:
        failure = error

    # Of these errors only one of TLS has a `reason`: an alert, or an end during the handshake.
    tls_reason = getattr(failure, "reason", None)
    was_closed = failure is None or isinstance(failure, ConnectionResetError | BrokenPipeError)
    if target.certificate is not None and not response and (was_closed or tls_reason):
        return "is alive; only a client with a certificate of its authorities can ask for more"

    if isinstance(failure, socket.gaierror | UnicodeError):
        reason = getattr(failure, "strerror", None) or "no network can have this name"
        raise _Unhealthy(
            f"{target} cannot be asked: {target.origin} names a host that cannot be resolved,"
            f" {target.hosts[0]}: {reason}"
        ) from failure
    if failure is not None:
        reason = tls_reason or getattr(failure, "strerror", None) or failure
        if target.settings_problem is not None:
            reason = f"{reason}; {target.settings_problem}"
        raise _Unhealthy(f"{target} cannot be asked: {reason}") from failure
    if not response:
        raise _Unhealthy(f"{target} closes the connection without an answer")

    head, _, body = response.partition(b"\r\n\r\n")
    version, _, status = head.partition(b"\r\n")[0].partition(b" ")
    if not version.startswith(b"HTTP/1.") or not status[:3].isdigit():
        hint = "" if target.tls else ": is it TLS?"
        raise _Unhealthy(f"{target} does not answer in HTTP{hint}")
    if status[:3] != b"200":
        sentence = f"{target} answers {status[:3].decode()}"
        # The body may have no reason, as that of a proxy.
        with suppress(ValueError, KeyError, TypeError):
            sentence += f": {json.loads(body)['error']}"
        raise _Unhealthy(sentence)
    return "is ready"


def _connect(target: _Target) -> socket.socket:
    """A connection to the first of the target's hosts that accepts one, with TLS if it speaks TLS.

    Raises the OSError of the first host if no host accepts.
    """
    failure: OSError | None = None
    connection = None
    for host in target.hosts:
        try:
            connection = socket.create_connection((host, target.port))
        except OSError as error:
            failure = failure or error
            continue
        target.hosts = (host,)
        break
    if connection is None:
        assert failure is not None, "there is a host"
        raise failure
    if not target.tls:
        return connection

    import ssl

    # The server's certificate names its public host, and not the local address. So it is not
    # verified; nothing secret is sent.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if target.certificate is not None:
        # A server accepts its own certificate from a client if one authority signs servers and
        # clients. A certificate that cannot be read here is not shown, and the server closes the
        # connection: `_ask` takes it for alive.
        with suppress(OSError, ValueError):
            context.load_cert_chain(
                *target.certificate,
                password=lambda: os.environ.get("EVALMODE_SSL_KEYFILE_PASSWORD", ""),
            )
    # An address with a scope, as fe80::1%eth0, is not a valid server name.
    host = target.hosts[0]
    return context.wrap_socket(connection, server_hostname=None if ":" in host else host)
