"""Requests that change the server's state come from its own users, not from a page in a browser.

A page of any site can send a POST to a server on its visitor's machine, without reading the answer.
Three headers that no script can forge tell such a request apart:

- Origin: a browser names the page's site in every POST of another site.
- Content-Type: forms and simple requests send text/plain or a form; JSON needs the server's consent
  first (a CORS preflight).
- Host: a site whose name is resolved to the server's own address (DNS rebinding) is its own origin,
  and its name is in this header.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request

from evalmode.service.errors import Forbidden, UnsupportedMedia
from evalmode.service.http.body import JSON, is_json, media_of
from evalmode.service.settings import Settings, setting_named
from evalmode.service.strict_json import shown

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]]+)(?::([0-9]{0,5}))?")
_DEFAULT_PORTS = {"http": 80, "https": 443}


def require_own_request(request: Request, settings: Settings) -> None:
    """Refuse a request that a page of another site may have sent.

    Clients that are no browser send no Origin header and may leave Content-Type out, as
    tritonclient does. Raises Forbidden and UnsupportedMedia.
    """
    hosts = request.headers.getlist("host")
    host = _host_of(request.headers)
    if host is None or not _is_own(host[1], settings):
        value = shown(", ".join(hosts)) if hosts else "none"
        raise Forbidden(
            "header host must name this machine where models are loaded and unloaded, got"
            f" {value}: ask by localhost or by an address of it, or add the name to"
            f" {setting_named('control_hosts')}",
            field="host",
        )
    origins = request.headers.getlist("origin")
    for origin in origins:
        if not _is_same(origin, host) and not {origin, "*"} & set(settings.cors_origins):
            raise Forbidden(
                f"a page of {shown(origin)} may not load or unload models: add it to"
                f" {setting_named('cors_origins')} if it should",
                field="origin",
            )
    content_types = request.headers.getlist("content-type")
    if not content_types and not origins:
        return
    media = media_of(content_types[0]) if len(content_types) == 1 else ", ".join(content_types)
    if not is_json(media):
        value = shown(media) if content_types else "none"
        raise UnsupportedMedia(
            f"the body must be JSON: send content-type {JSON}, got {value}", field="content-type"
        )


def is_of_another_site(headers: Headers) -> bool:
    """Whether a page of another site sent a request, as far as its headers tell."""
    host = _host_of(headers)
    return any(host is None or not _is_same(origin, host) for origin in headers.getlist("origin"))


def _host_of(headers: Headers) -> re.Match[str] | None:
    """The name and the port in the Host header; None where there is not just one that is valid."""
    hosts = headers.getlist("host")
    return _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None


def _is_own(name: str, settings: Settings) -> bool:
    """Whether a Host header with this name reached the server by a name of its own.

    No site can be an IP address that it does not have, so addresses are safe from rebinding. A
    server that listens on this machine alone is reached by its local addresses alone.
    """
    name = name.lower().removesuffix(".")
    bound = settings.host.lower().removesuffix(".")
    allowed = {host.lower().removesuffix(".") for host in settings.control_hosts}
    if "*" in allowed or name in allowed | {bound, "localhost"} or name.endswith(".localhost"):
        return True
    is_local = bound == "localhost" or (_address(bound) or _ANY).is_loopback
    address = _address(name.strip("[]"))
    if address is not None:
        return address.is_loopback or not is_local
    return not is_local and name == socket.gethostname().lower()


_ANY = ipaddress.IPv4Address(0)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _is_same(origin: str, host: re.Match[str]) -> bool:
    """Whether the page is one of this server: its origin is the host that it asks.

    The scheme is not compared: behind a proxy that ends TLS the page's is https and ours is http.
    """
    try:
        parts = urlsplit(origin)
        origin_port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return False
    host_port = int(host[2]) if host[2] else _DEFAULT_PORTS.get(parts.scheme)
    return (
        parts.scheme in _DEFAULT_PORTS
        and parts.hostname == host[1].strip("[]").lower()
        and origin_port == host_port
    )
