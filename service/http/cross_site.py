"""Requests that a page of another site may have sent (cross-site request forgery).

A page of any site can make the browser of its visitor send a POST to a server on the visitor's
machine. It cannot read the response, but the server may have changed. Three headers, which no
script can forge, show where a request comes from:

- Origin: a browser names the site of the page in every POST to another site.
- Content-Type: forms and simple requests send text/plain or a form. For JSON a browser first asks
  the server for permission (a CORS preflight).
- Host: in a DNS rebinding attack the name of the attacker's site resolves to the address of this
  server. The page then has the same origin as the server, but its name is in this header.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request

from evalmode.service.errors import Forbidden, UnsupportedMedia
from evalmode.service.http.body import JSON, is_json_type, media_type_of
from evalmode.service.settings import Settings, setting_named
from evalmode.service.strict_json import shown

# The groups are the name or address, IPv6 in brackets, and the port.
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]]+)(?::([0-9]{0,5}))?")
_DEFAULT_PORTS = {"http": 80, "https": 443}


def refuse_cross_site(request: Request, settings: Settings) -> None:
    """Raise Forbidden or UnsupportedMedia for a request that a page of another site may have sent.

    It is refused, in this order, if

    1. its Host header does not name this machine (403);
    2. an Origin header names another site that the settings do not allow (403);
    3. its content type is not JSON, or is missing beside an Origin header (415).

    Clients that are not browsers send no Origin header. They may leave the content type out, as
    tritonclient does.
    """
    hosts = request.headers.getlist("host")
    host = _host_of(request.headers)
    if host is None or not _names_this_machine(host[1], settings):
        value = shown(", ".join(hosts)) if hosts else "none"
        raise Forbidden(
            "header host must name this machine where models are loaded and unloaded, got"
            f" {value}: send the request to localhost or to an address of it, or add the name to"
            f" {setting_named('control_hosts')}",
            field="host",
        )

    origins = request.headers.getlist("origin")
    for origin in origins:
        is_allowed = origin in settings.cors_origins or "*" in settings.cors_origins
        if not is_allowed and not _is_same_origin(origin, host):
            raise Forbidden(
                f"a page of {shown(origin)} may not load or unload models: add it to"
                f" {setting_named('cors_origins')} if it should",
                field="origin",
            )

    content_types = request.headers.getlist("content-type")
    if not content_types and not origins:
        return
    # Several headers are not JSON, whatever is in them: joined they are no media type.
    media_type = ", ".join(content_types)
    if len(content_types) == 1:
        media_type = media_type_of(content_types[0])
    if not is_json_type(media_type):
        value = shown(media_type) if content_types else "none"
        raise UnsupportedMedia(
            f"the body must be JSON: send content-type {JSON}, got {value}", field="content-type"
        )


def is_cross_origin(headers: Headers) -> bool:
    """Whether a page of another origin sent the request with these headers.

    A request without an Origin header counts as one of the same origin.
    """
    host = _host_of(headers)
    origins = headers.getlist("origin")
    return any(host is None or not _is_same_origin(origin, host) for origin in origins)


def _host_of(headers: Headers) -> re.Match[str] | None:
    """The name and the port in the Host header; None unless there is exactly one valid header."""
    hosts = headers.getlist("host")
    return _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None


def _names_this_machine(name: str, settings: Settings) -> bool:
    """Whether the name in a Host header belongs to this machine, and not to some site.

    1. Names in the settings, `localhost` and names below it belong to it.
    2. So does any IP address, because rebinding needs a name. A server that listens on a loopback
       address has loopback addresses alone.
    3. So does the host name of the machine, unless the server listens on a loopback address.
    """
    name = name.lower().removesuffix(".")
    bound_name = settings.host.lower().removesuffix(".")
    allowed_names = {host.lower().removesuffix(".") for host in settings.control_hosts}
    if "*" in allowed_names or name in {*allowed_names, bound_name, "localhost"}:
        return True
    if name.endswith(".localhost"):
        return True

    bound_address = _ip_address(bound_name)
    is_loopback_only = bound_name == "localhost" or (
        bound_address is not None and bound_address.is_loopback
    )
    address = _ip_address(name.strip("[]"))
    if address is not None:
        return address.is_loopback or not is_loopback_only
    return not is_loopback_only and name == socket.gethostname().lower()


def _ip_address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _is_same_origin(origin: str, host: re.Match[str]) -> bool:
    """Whether the page at `origin` comes from this server, which the request calls `host`.

    The scheme is not compared: behind a proxy that ends TLS the page has https, and the request
    that arrives here has http.
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
