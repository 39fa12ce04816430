"""SIGTERM and SIGINT of a process that serves: who is told of them. Knows not what they lead to."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


class Stopped(SystemExit):
    """A signal asked for the end; where nothing catches this (a model is still loading) the exit
    code is 0.
    """


class Signals:
    """SIGTERM and SIGINT of this process, as a context: they end it, or go to whoever was named
    last.

    Once one came the process is on its way out: when the context is left, further ones are not
    heard, or an impatient second one would turn the exit code of an end in good order into that of
    a kill.
    """

    def __init__(self) -> None:
        self._came = False
        self._to: Callable[[int], object] | None = None

    def to(self, receiver: Callable[[int], object]) -> None:
        """Hand further signals to this; it is called between any two instructions of the main
        thread.
        """
        self._to = receiver

    def __enter__(self) -> Signals:
        self._earlier = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_IGN if self._came else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        if self._to is None:
            raise Stopped(0)
        self._to(number)
