"""Opens files at paths from outside, but only regular ones, and without waiting for a process.

Opening a FIFO waits for its other end, and opening a device may have effects.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class NotRegular(Exception):  # noqa: N818 - read as a sentence: "raise NotRegular"
    """The path leads to something other than a regular file; `kind` is "a FIFO", for example."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"{kind} and not a regular file")
        self.kind = kind


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; links are followed.

    Raises NotRegular for anything else, and OSError as `open` does.
    """
    _require_regular(path.stat())
    # Another file may have replaced it by now. The flags keep its opening from waiting, and from
    # making a terminal the one that controls this process; then the open file is checked.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    file = open(descriptor, "rb")  # noqa: SIM115 - the caller closes it
    try:
        _require_regular(os.fstat(descriptor))
    except BaseException:
        file.close()
        raise
    return file


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotRegular(_KINDS.get(stat.S_IFMT(status.st_mode), "something else"))
