"""Who waits for room in the queue, first come first served. Knows neither the queue nor its
lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Room:
    """Those who wait, each with the rows and bytes he needs room for.

    One has his turn at a time: nothing is reserved for him, so what he leaves for the next is known
    only when he has had it. Who waits on an event loop that was closed is passed over.
    """

    def __init__(self, fits: Callable[[int, int], bool]) -> None:
        self._fits = fits
        self._waiting: dict[asyncio.Future[None], tuple[int, int]] = {}
        self._turn: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def join(self, future: asyncio.Future[None], *, rows: int, nbytes: int) -> bool:
        """Wait behind all who wait already; False when nobody does and there is room now."""
        if not self._waiting and not self._is_taking() and self._fits(rows, nbytes):
            return False
        self._waiting[future] = (rows, nbytes)
        return True

    def leave(self, future: asyncio.Future[None]) -> None:
        """Wait no more, or have had one's turn."""
        self._waiting.pop(future, None)
        if self._turn is future:
            self._turn = None

    def next(self) -> asyncio.Future[None] | None:
        """The first, if there is room for him and nobody has his turn; it is his now, until he
        leaves.
        """
        if self._is_taking():
            return None
        while self._waiting:
            future, (rows, nbytes) = next(iter(self._waiting.items()))
            if not (gone := future.get_loop().is_closed()) and not self._fits(rows, nbytes):
                break  # nobody is served before him, or a large request would never be
            del self._waiting[future]
            if not gone:
                self._turn = future
                return future
        return None

    def all(self) -> list[asyncio.Future[None]]:
        """Everybody; nobody waits any more."""
        everybody = list(self._waiting)
        self._waiting.clear()
        return everybody

    def _is_taking(self) -> bool:
        return self._turn is not None and not self._turn.get_loop().is_closed()
