"""Callers that wait until the queue has room for their rows, first come first served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class WaitingCallers:
    """The futures of the waiting callers, each with the rows and bytes that it needs room for.

    Room is not reserved, so how much is left for the next caller is known only once this one has
    used it. Therefore one caller at a time has the turn, from `next_caller` until `leave`.

    Callers on a closed event loop are skipped. Calls must not overlap: the queue makes them with
    its lock held.
    """

    def __init__(self, fits: Callable[[int, int], bool]) -> None:
        """`fits(rows, nbytes)` is whether the queue has room for them now."""
        self._fits = fits
        self._needs: dict[asyncio.Future[None], tuple[int, int]] = {}
        self._turn: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._needs)

    def join(self, future: asyncio.Future[None], *, rows: int, nbytes: int) -> bool:
        """Wait behind all other callers; False if none wait and there is room now."""
        if not self._needs and not self._has_turn() and self._fits(rows, nbytes):
            return False
        self._needs[future] = (rows, nbytes)
        return True

    def leave(self, future: asyncio.Future[None]) -> None:
        """Stop waiting, or end the turn."""
        self._needs.pop(future, None)
        if self._turn is future:
            self._turn = None

    def next_caller(self) -> asyncio.Future[None] | None:
        """Give the turn to the first caller that waits, and return it.

        None if no caller waits, if the first one does not fit, or while another has the turn.
        """
        if self._has_turn():
            return None
        while self._needs:
            future, (rows, nbytes) = next(iter(self._needs.items()))
            loop_is_closed = future.get_loop().is_closed()
            # Later callers must not pass this one, or a large request would wait forever.
            if not loop_is_closed and not self._fits(rows, nbytes):
                return None
            del self._needs[future]
            if not loop_is_closed:
                self._turn = future
                return future
        return None

    def clear(self) -> list[asyncio.Future[None]]:
        """Remove all waiting callers and return them."""
        futures = list(self._needs)
        self._needs.clear()
        return futures

    def _has_turn(self) -> bool:
        return self._turn is not None and not self._turn.get_loop().is_closed()
