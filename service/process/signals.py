"""SIGTERM and SIGINT of a server process, and how they interrupt a call that takes long."""

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
    """A signal arrived before there was a receiver. Uncaught, it ends the process with code 0."""


class Signals:
    """SIGTERM and SIGINT of this process, as a context.

    A signal goes to the receiver, or raises Stopped in the main thread if there is none. After the
    first signal the process ends, so at the exit of the context further signals become ignored.
    Otherwise an impatient second signal would change the exit code of a graceful end.
    """

    def __init__(self) -> None:
        self._has_arrived = False
        self._receiver: Callable[[int], object] | None = None

    def send_to(self, receiver: Callable[[int], object]) -> None:
        """Pass signals to `receiver`, between any two instructions of the main thread."""
        self._receiver = receiver

    def __enter__(self) -> Signals:
        self._previous_handlers = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, signal.SIG_IGN if self._has_arrived else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._has_arrived = True
        if self._receiver is None:
            raise Stopped(0)
        self._receiver(number)


def interruptible(function: Callable[[], Result]) -> Result:
    """The result of a function that may never return, such that a signal can interrupt it.

    Python runs signal handlers in the main thread, between two of its instructions. So it runs none
    while the main thread is in a call of ONNX Runtime (a model with an endless loop), of the name
    service or of a file system. Here the function runs in another thread, and signals interrupt
    the wait for it.
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
        # The thread still runs. The destructors of ONNX Runtime would free memory that it uses, so
        # the process ends without them.
        atexit.register(_exit_without_destructors)
        raise


def _exit_without_destructors() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)
