"""Who waits for room in the queue, first come first served. Knows neither the queue nor its lock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Room:
    """Those who wait, each with the rows and bytes he needs room for.

    One is woken at a time, and when he has had his turn the next: nothing is reserved for him, so how much he took is
    known only then.
    """

    def __init__(self, fits: Callable[[int, int], bool]) -> None:
        self._fits = fits
        self._waiting: dict[asyncio.Future[None], tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, future: asyncio.Future[None]) -> bool:
        return future in self._waiting

    def join(self, future: asyncio.Future[None], *, rows: int, nbytes: int) -> bool:
        """Wait behind all who wait already; False when nobody does and there is room now."""
        if not self._waiting and self._fits(rows, nbytes):
            return False
        self._waiting[future] = (rows, nbytes)
        return True

    def leave(self, future: asyncio.Future[None]) -> None:
        """Wait no more."""
        self._waiting.pop(future, None)

    def next(self) -> asyncio.Future[None] | None:
        """The first, if there is room for him; he waits no more."""
        for future, (rows, nbytes) in self._waiting.items():
            if self._fits(rows, nbytes):
                del self._waiting[future]
                return future
            break  # nobody is served before him, or a large request would never be
        return None

    def all(self) -> list[asyncio.Future[None]]:
        """Everybody; nobody waits any more."""
        everybody = list(self._waiting)
        self._waiting.clear()
        return everybody
