"""How many connections each process of a server has, so that each of them takes its share.

All processes accept from one socket. The first one that wakes would take a whole burst of
connections, and clients keep them: the other processes would have nothing to do.

The counts are in memory that all processes map: a file of eight bytes for each, with its process id
as the name, in a folder that only these processes use. A count is a hint. One that is out of date
costs a moment's wait, since no process leaves a connection to the others for longer.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from pathlib import Path

_COUNT = struct.Struct("=q")
# The count of a process that accepts nothing at the moment.
_NOT_ACCEPTING = -1


class ConnectionCounts:
    """The count of this process, and those of the others. For one thread."""

    def __init__(self, folder: Path) -> None:
        """Begin with a process that accepts nothing. Raises OSError if `folder` cannot be used."""
        self._folder = folder / "connections"
        self._folder.mkdir(exist_ok=True)
        self._own_name = str(os.getpid())
        self._own = self._open(self._own_name, os.O_RDWR | os.O_CREAT)
        # The counts that are open, by the name of their file.
        self._others: dict[str, mmap.mmap] = {}
        self.publish(None)

    def publish(self, count: int | None) -> None:
        """Tell the others how many connections this process has; None if it accepts nothing."""
        _COUNT.pack_into(self._own, 0, _NOT_ACCEPTING if count is None else count)

    def lowest_of_others(self) -> int | None:
        """The lowest count of another process that accepts connections; None if there is none."""
        counts: list[int] = []
        others: dict[str, mmap.mmap] = {}
        try:
            names = os.listdir(self._folder)
        except OSError:
            # The first process that outlives its supervisor removes the folder.
            return None
        for name in names:
            if name == self._own_name:
                continue
            try:
                # A process that was killed leaves its file.
                os.kill(int(name), 0)
                others[name] = self._others.get(name) or self._open(name, os.O_RDWR)
            except ProcessLookupError:
                with contextlib.suppress(OSError):
                    os.unlink(self._folder / name)
                continue
            except (OSError, ValueError):
                # It begins or ends at this moment.
                continue
            (count,) = _COUNT.unpack_from(others[name], 0)
            if count != _NOT_ACCEPTING:
                counts.append(count)
        # Without those of processes that have ended.
        self._others = others
        return min(counts, default=None)

    def _open(self, name: str, flags: int) -> mmap.mmap:
        descriptor = os.open(self._folder / name, flags | os.O_CLOEXEC, 0o600)
        try:
            if flags & os.O_CREAT:
                os.ftruncate(descriptor, _COUNT.size)
            return mmap.mmap(descriptor, _COUNT.size)
        finally:
            os.close(descriptor)
