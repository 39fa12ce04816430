"""The socket that a server listens on, and its TLS. Knows nothing of what is said over it."""

from __future__ import annotations

import socket
import ssl

from evalmode.service.errors import StartFailed
from evalmode.service.settings import Settings


def bound(settings: Settings) -> socket.socket:
    """A socket that holds the port and does not listen yet: until the model is ready, connections
    are refused.

    Raises StartFailed when the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise cannot_listen(settings, error) from error
    return listener


def cannot_listen(settings: Settings, error: OSError) -> StartFailed:
    """The sentence for an address that cannot be had."""
    return StartFailed(
        f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}"
    )


def url_of(settings: Settings, listener: socket.socket) -> str:
    """Where this socket is reached, with the port that it was given."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.ssl_certfile else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """What the settings say of TLS; None where they ask for none.

    Raises StartFailed, naming the setting, for a file that is missing or not what it should be.
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
    context.set_alpn_protocols(["http/1.1"])
    secret = settings.ssl_keyfile_password
    try:
        context.load_cert_chain(
            settings.ssl_certfile,
            settings.ssl_keyfile,
            # Without one OpenSSL would ask at the terminal, and a service would wait there for
            # ever.
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
        _demand_certificates(context, settings)
    return context


def _demand_certificates(context: ssl.SSLContext, settings: Settings) -> None:
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(settings.ssl_ca_certs)
    except OSError as error:
        raise StartFailed(
            f"setting ssl_ca_certs: {settings.ssl_ca_certs} holds no certificates: {error}"
        ) from error
