"""SIGTERM and SIGINT of a process that serves: what they call, and how they end what takes long."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType
from typing import TypeVar

Result = TypeVar("Result")


class Stopped(SystemExit):
    """A signal asked for the end; where nothing catches this (a model is still loading) the exit
    code is 0.
    """


class Signals:
    """SIGTERM and SIGINT of this process, as a context: they end it, or call what was named last.

    After the first signal the process is on its way out: when the context is left, further ones are
    ignored, or an impatient second one would turn the exit code of an end in good order into that
    of a kill.
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


def interruptible(function: Callable[[], Result]) -> Result:
    """Call a function that may take for ever in a thread, and wait for its result.

    Python runs signal handlers in the main thread, between two of its instructions. A main thread
    within a call of the runtime (a model with an endless loop), of the name service or of a file
    system would run none. A wait for a thread is interrupted by signals.
    """
    outcome: Future[Result] = Future()

    def call() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=call, name="start", daemon=True).start()
    try:
        return outcome.result()
    except Stopped:
        # The thread still runs, and the runtime's destructors would take its memory away.
        atexit.register(_leave)
        raise


def _leave() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)
