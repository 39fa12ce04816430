"""The socket that a server listens on, and its TLS."""

from __future__ import annotations

import socket
import ssl

from evalmode.service.errors import StartFailed
from evalmode.service.settings import Settings


def bind_listener(settings: Settings) -> socket.socket:
    """A socket that holds the port and does not listen yet.

    Connections are refused until it listens, which is when the models are ready. Raises
    StartFailed if the address cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        # The port can be bound again while connections of an earlier server are in TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise listen_failure(settings, error) from error
    return listener


def listen_failure(settings: Settings, error: OSError) -> StartFailed:
    """The exception for an address on which this process cannot listen."""
    return StartFailed(
        f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}"
    )


def url_of(settings: Settings, listener: socket.socket) -> str:
    """The URL of a bound socket, with its real port: `http://127.0.0.1:8000`."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.ssl_certfile else "http"
    if ":" in host:
        host = f"[{host}]"  # an IPv6 address
    return f"{scheme}://{host}:{port}"


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """The TLS context of these settings, or None for plain HTTP.

    Raises StartFailed, which names the setting, for a missing file or one with the wrong content.
    """
    if settings.ssl_certfile is None:
        for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"):
            if getattr(settings, name) is not None:
                raise StartFailed(
                    f"setting {name} is of no use without ssl_certfile, the server's certificate"
                )
        return None
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        path = getattr(settings, name)
        if path is not None and not path.is_file():
            raise StartFailed(f"setting {name}: there is no file {path}")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Clients that can speak HTTP/2 must not choose it.
    context.set_alpn_protocols(["http/1.1"])

    secret = settings.ssl_keyfile_password
    try:
        context.load_cert_chain(
            settings.ssl_certfile,
            settings.ssl_keyfile,
            # Without a password OpenSSL would prompt for one at the terminal, and a service would
            # never start.
            password=secret.get_secret_value() if secret else lambda: "",
        )
    except (OSError, ValueError) as error:
        key = settings.ssl_keyfile or settings.ssl_certfile
        raise StartFailed(
            f"settings ssl_certfile and ssl_keyfile: {settings.ssl_certfile} and {key} are no"
            " certificate with its private key, or ssl_keyfile_password is not its password:"
            f" {error}"
        ) from error

    if settings.ssl_ca_certs is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(settings.ssl_ca_certs)
        except OSError as error:
            raise StartFailed(
                f"setting ssl_ca_certs: {settings.ssl_ca_certs} holds no certificates: {error}"
            ) from error
    return context
