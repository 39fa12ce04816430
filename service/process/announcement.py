"""Announces where a server listens, so that `evalmode healthcheck` finds it without its flags.

The announcement is an anonymous file in memory (memfd), which other processes of the same user read
through /proc. It needs no writable file system, and it ends with its process. This module imports
the standard library alone, because a health check must start quickly on a tenth of a core.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evalmode.service.settings import Settings

_NAME = "evalmode-server"
_LINK = f"/memfd:{_NAME} (deleted)"
_MAX_BYTES = 65_536
# The variables that give a server its address. A health check with the same values means this
# server, even if a flag or a file gave the server another address.
_VARIABLES = ("EVALMODE_CONFIG", "EVALMODE_HOST", "EVALMODE_PORT")


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """A running server.

    Attributes:
        host: the numeric address that it is bound to.
        port: its port.
        tls: whether it speaks TLS.
        certificate: the files of its certificate and key, if clients must show a certificate too.
        environment: the variables of its environment that give a server its address.
    """

    host: str
    port: int
    tls: bool = False
    certificate: tuple[str, str] | None = None
    environment: Mapping[str, str]


@contextmanager
def announced(settings: Settings, listener: socket.socket) -> Iterator[None]:
    """Announce the server of these settings, on this bound socket, while the context is open."""
    address = listener.getsockname()
    host = address[0].partition("%")[0]
    # A link-local IPv6 address is reached only through its interface, the fourth item.
    if len(address) == 4 and address[3]:
        host += f"%{address[3]}"
    certificate = None
    if settings.ssl_certfile is not None and settings.ssl_ca_certs is not None:
        key = settings.ssl_keyfile or settings.ssl_certfile
        certificate = str(settings.ssl_certfile.resolve()), str(key.resolve())
    announcement = Announcement(
        host=host,
        port=address[1],
        tls=settings.ssl_certfile is not None,
        certificate=certificate,
        environment=address_variables(),
    )
    try:
        descriptor = os.memfd_create(_NAME)
    except (AttributeError, OSError):
        # The system has no memfd, or forbids it: then a health check needs the address.
        yield
        return
    try:
        os.write(descriptor, json.dumps(asdict(announcement)).encode())
        yield
    finally:
        os.close(descriptor)


def announcements() -> dict[int, Announcement]:
    """The servers of the current user, by process id. Empty where /proc does not show them."""
    servers = {}
    try:
        processes = [process for process in Path("/proc").iterdir() if process.name.isdecimal()]
    except OSError:
        return {}
    for process in processes:
        try:
            if process.stat().st_uid != os.geteuid():
                continue
            if announcement := _read_announcement(process):
                servers[int(process.name)] = announcement
        except OSError:
            # The process has ended, or its files are hidden.
            continue
    return servers


def address_variables() -> dict[str, str]:
    """The variables of this environment that give a server its address, in upper case."""
    environment = {name.upper(): value for name, value in os.environ.items()}
    return {name: environment[name] for name in _VARIABLES if name in environment}


def _read_announcement(process: Path) -> Announcement | None:
    """The announcement of a process, given its folder below /proc. None if it has none."""
    for descriptor in (process / "fd").iterdir():
        try:
            if os.readlink(descriptor) != _LINK:
                continue
            with descriptor.open("rb") as file:
                return Announcement(**json.loads(file.read(_MAX_BYTES)))
        except (OSError, ValueError, TypeError):
            # It has been closed meanwhile, or another version of evalmode wrote it.
            continue
    return None
