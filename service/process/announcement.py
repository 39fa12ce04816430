"""Where a server listens, for other processes of its user: `evalmode healthcheck` finds it whatever
flags it was started with.

The announcement is an anonymous file in memory (memfd). It needs no writable file system and no
clean-up: it is found through /proc and ends with its process. This module imports the standard
library alone, for a health check must start quickly on a tenth of a core.
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
# What names a server's address in the environment. A health check in the same environment means
# this server, also where a flag or a file gave it another address.
_VARIABLES = ("EVALMODE_CONFIG", "EVALMODE_HOST", "EVALMODE_PORT")


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """A server that runs.

    Attributes:
        host: the address that it is bound to, as numbers.
        port: its port.
        tls: whether it speaks TLS.
        certificate: the files of its certificate and key, where clients must show one too.
        environment: the variables that gave it an address.
    """

    host: str
    port: int
    tls: bool = False
    certificate: tuple[str, str] | None = None
    environment: Mapping[str, str]


@contextmanager
def announced(settings: Settings, listener: socket.socket) -> Iterator[None]:
    """Announce the server of these settings on this bound socket while the context is open."""
    address = listener.getsockname()
    host = address[0].partition("%")[0]
    if len(address) == 4 and address[3]:  # link-local: reached only through its interface
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
    except (AttributeError, OSError):  # another system, or one that forbids it
        yield
        return
    try:
        os.write(descriptor, json.dumps(asdict(announcement)).encode())
        yield
    finally:
        os.close(descriptor)


def announcements() -> dict[int, Announcement]:
    """The servers that the current user runs, by process id; empty where /proc does not show
    them.
    """
    servers = {}
    for process in _processes():
        try:
            if process.stat().st_uid != os.geteuid():
                continue
            if announcement := _announcement_of(process):
                servers[int(process.name)] = announcement
        except OSError:  # it has ended, or its files are not shown
            continue
    return servers


def address_variables() -> dict[str, str]:
    """The variables of this environment that give a server its address; their names may be in
    either case.
    """
    environment = {name.upper(): value for name, value in os.environ.items()}
    return {name: environment[name] for name in _VARIABLES if name in environment}


def _processes() -> list[Path]:
    try:
        return [process for process in Path("/proc").iterdir() if process.name.isdecimal()]
    except OSError:
        return []


def _announcement_of(process: Path) -> Announcement | None:
    for descriptor in (process / "fd").iterdir():
        try:
            if os.readlink(descriptor) != _LINK:
                continue
            with descriptor.open("rb") as file:
                return Announcement(**json.loads(file.read(_MAX_BYTES)))
        except (OSError, ValueError, TypeError):  # closed meanwhile, or of another version
            continue
    return None
