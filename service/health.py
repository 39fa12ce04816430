"""Whether a server process should be asked, and whether it should go on. Knows no HTTP and no
engine.

The server calls `serve` and `drain`; whether a batch is stuck is asked of the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

# Where health is asked: answered even where nothing else is.
PROBE_PATHS = frozenset({"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})


class Stage(Enum):
    """What a server process is doing."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


class Health:
    """Readiness and liveness of one process. Safe to ask and to tell from any thread.

    `stuck_s` gives the seconds by which the longest batch exceeds what a batch may take, 0.0 when
    none does; beyond `grace_s` of them nothing is expected of this process any more. A batch that
    ends after all makes it well again.
    """

    def __init__(self, *, stuck_s: Callable[[], float], grace_s: float) -> None:
        self._stuck_s = stuck_s
        self._grace_s = grace_s
        self._stage = Stage.STARTING

    @property
    def stage(self) -> Stage:
        """What the process is doing."""
        return self._stage

    def serve(self) -> None:
        """Everything is loaded: requests are welcome, unless the end has begun already."""
        if self._stage is Stage.STARTING:
            self._stage = Stage.SERVING

    def drain(self) -> None:
        """The end begins: nothing more should be sent here. There is no way back."""
        self._stage = Stage.DRAINING

    def ready(self) -> str | None:
        """None when requests are welcome, else the reason why not, in one sentence."""
        if self._stage is Stage.STARTING:
            return "the server is starting"
        if self._stage is Stage.DRAINING:
            return "the server is stopping"
        stuck_s = self._stuck_s()
        return f"a batch runs {stuck_s:.1f} s longer than it may" if stuck_s > 0 else None

    def live(self) -> str | None:
        """None while the process should go on, else the reason why it should be restarted, in one
        sentence.
        """
        stuck_s = self._stuck_s()
        if stuck_s <= self._grace_s:
            return None
        return f"a batch runs {stuck_s:.1f} s longer than it may: this process needs a restart"
