"""How the processes of one server take turns at trials, and share the outcome of each.

The workers of a server open the same bundles at the same moments: at the start, and when a new
version appears. One trial serves all of them. Otherwise each worker would have a child process, and
all of them together would measure on too few cores.

An outcome is taken over only if all of these hold:

1. It is in a folder that belongs to this user and that nobody else can enter.
2. Its manifest, its certificate and the options are the same. The manifest has the hash of every
   other file, and the process that opens the bundle compares them.
3. A success is at most `_FRESH_S` old. So a worker that is replaced later makes its own trial.
4. A failure is younger than the wish for a trial. So a bundle that is loaded again is tried again.

Importing this module loads neither NumPy nor pydantic.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evalmode.atomic_files import write_file

# How long the outcome of a trial is taken over. The workers look at the folder every two seconds by
# default, each at another moment.
_FRESH_S = 30.0
# The interval at which a process that waits for its turn tries again.
_POLL_S = 0.01


class SharedTrials:
    """The turns and the outcomes, in a folder that only the processes of one server use.

    For one thread. The methods raise OSError where the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # The open lock file, while this process has its turn.
        self._lock: int | None = None

    @property
    def is_private(self) -> bool:
        """Whether the folder belongs to this user, and nobody else can enter it."""
        try:
            status = self._folder.stat()
        except OSError:
            return False
        mode = stat.S_IMODE(status.st_mode)
        return status.st_uid == os.geteuid() and mode & (stat.S_IRWXG | stat.S_IRWXO) == 0

    def try_take_turn(self) -> bool:
        """Take the turn if no other process has it. The kernel ends it with this process."""
        if self._lock is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            lock = os.open(self._folder / "trial.lock", flags, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                return False
            self._lock = lock
        return True

    def take_turn(self, *, cancelled: Callable[[], bool]) -> None:
        """Wait for the turn, or until it is `cancelled`."""
        while not self.try_take_turn() and not cancelled():
            time.sleep(_POLL_S)

    def end_turn(self) -> None:
        """Let the next process take its turn."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def outcome(self, key: str, *, wished_at: float) -> Mapping[str, Any] | None:
        """The outcome of another trial with this key, or None. `wished_at` is when this process
        wished for one, by `now`.
        """
        try:
            record = json.loads(self._file(key).read_bytes())
        except FileNotFoundError:
            return None
        outcome: Mapping[str, Any] = record["outcome"]
        earliest = now() - _FRESH_S if "measured" in outcome else wished_at
        return outcome if record["ended_at"] >= earliest else None

    def share(self, key: str, outcome: Mapping[str, Any]) -> None:
        """Let other processes take over the outcome of a trial that has just ended, in the turn of
        this process.
        """
        if self._lock is None:
            # The turn could not be taken: the folder is gone, and must not be made again.
            return
        record = {"ended_at": now(), "outcome": outcome}
        write_file(self._file(key), json.dumps(record).encode())

    def _file(self, key: str) -> Path:
        return self._folder / f"trial-{key}.json"


def now() -> float:
    """Seconds since the machine started, which no change of its clock moves."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)
