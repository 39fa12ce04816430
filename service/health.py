"""The readiness and the liveness of a server process.

A load balancer sends requests to a process that is ready, and an orchestrator restarts a process
that is not live. The server calls `Health.serve` and `Health.drain`. The engine says whether a
batch is stuck. A swap of a model changes neither: the old version answers until the new one is
open.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

# The paths of health probes. They are answered even when nothing else is.
PROBE_PATHS = frozenset({"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})


class Stage(Enum):
    """What a server process is doing."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


class Health:
    """Readiness and liveness of one process. Every method is safe in any thread.

    `stuck_s` returns by how many seconds the longest batch exceeds the time for a batch, and 0.0 if
    none does. Above 0 the process is not ready; above `grace_s` it is not live either. If the batch
    ends after all, the process is ready and live again.
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
        """Everything is loaded: become ready, unless the end has already begun."""
        if self._stage is Stage.STARTING:
            self._stage = Stage.SERVING

    def drain(self) -> None:
        """The end begins: become not ready for good."""
        self._stage = Stage.DRAINING

    def ready(self) -> str | None:
        """None if the process is ready, else the reason why not, in one sentence."""
        if self._stage is Stage.STARTING:
            return "the server is starting"
        if self._stage is Stage.DRAINING:
            return "the server is stopping"
        stuck_s = self._stuck_s()
        if stuck_s > 0:
            return f"a batch exceeds its time limit by {stuck_s:.1f} s"
        return None

    def live(self) -> str | None:
        """None if the process is live, else the reason to restart it, in one sentence."""
        stuck_s = self._stuck_s()
        if stuck_s <= self._grace_s:
            return None
        return f"a batch exceeds its time limit by {stuck_s:.1f} s: this process needs a restart"
