"""How the engine's threads share cores with the thread that answers HTTP. Knows no queue and no engine."""

from __future__ import annotations

import os
import sys
import threading

_STEPS = 10  # weighs a tenth of what the event loop does, wherever both want the same core


def stand_back() -> None:
    """Let every other thread of this process go before this one, where the system can tell them apart.

    A batch keeps its core busy for milliseconds, an answer takes the event loop a fraction of one: with equal weights
    all who are to be refused, and all probes of health, queue up behind the batches as soon as there is no idle core.
    """
    if sys.platform == "linux":  # elsewhere niceness belongs to the process
        me = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, me, min(19, os.getpriority(os.PRIO_PROCESS, me) + _STEPS))
