"""Verify many targets over the cores of this machine: answers in order, models in memory within a
budget.

Threads, not processes: on two cores 2,024 small files took 1.1 s in one thread or two and 1.0 s in
two processes; six of 200 MB took 0.5 s in one thread, 0.3 s in two, 0.6 s in two processes. A
process starts in half a second; reading, parsing and running a graph let go of the interpreter's
lock. Knows no rule and no format.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from evalmode.export.verify import guarded
from evalmode.export.verify.options import DEFAULTS, Options
from evalmode.export.verify.targets import Target
from evalmode.export.verify.verify import Examined, examine

# The bytes of ONNX files that may be open at once; parsed, a model takes about twice its file. One
# that is larger than the budget is examined while no other is.
_BUDGET = 2 << 30


def examine_all(
    targets: Sequence[Target], options: Options = DEFAULTS, *, threads: int | None = None
) -> Iterator[Examined]:
    """The answer for each target, in the order of the targets, as they come.

    By default on every core there is; one after the other where files are run, for a runtime has
    threads of its own. Leaving early ends what runs.
    """
    threads = threads or (_cores() if options.samples is None else 1)
    if threads == 1:
        yield from (examine(target, options) for target in targets)
        return
    budget = _Budget(_BUDGET)

    def work(target: Target) -> Examined:
        with budget.spent(target.bytes):
            return examine(target, options)

    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(work, targets)
        except BaseException:  # KeyboardInterrupt, and the end of the caller, too
            pool.shutdown(wait=False, cancel_futures=True)
            guarded.interrupt()
            raise


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Budget:
    """Lets callers in while what they spend together stays within a limit, and anyone who comes
    alone.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._spent = limit, 0
        self._changed = threading.Condition()

    @contextmanager
    def spent(self, amount: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._spent == 0 or self._spent + amount <= self._limit)
            self._spent += amount
        try:
            yield
        finally:
            with self._changed:
                self._spent -= amount
                self._changed.notify_all()
