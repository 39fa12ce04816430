"""The components of a server process while it serves: models, engine, metrics, health.

The rows of a request go from a model of the repository to the engine. The engine's observers keep
the metrics.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from starlette.requests import Request

from evalmode.bundle.known_answers import Tensors
from evalmode.service.all_processes import AllProcesses, OneProcess
from evalmode.service.batching.bucket import Job
from evalmode.service.batching.engine import Engine
from evalmode.service.batching.limits import Limits
from evalmode.service.cpu_quota import cpu_quota
from evalmode.service.health import Health
from evalmode.service.models.repository import Repository
from evalmode.service.models.tensors import content_of
from evalmode.service.models.trial import TrialOpener
from evalmode.service.settings import Settings
from evalmode.service.telemetry.logs import ViolationLog
from evalmode.service.telemetry.metrics import Metrics
from evalmode.service.telemetry.statistics import Statistics
from evalmode.service.telemetry.timings import Timings
from evalmode.service.telemetry.tracing import Tracing, open_tracing


@dataclass(frozen=True, kw_only=True)
class Components:
    """The components of a server process. `close` them at the end."""

    settings: Settings
    repository: Repository
    engine: Engine
    metrics: Metrics
    statistics: Statistics
    health: Health
    processes: AllProcesses
    tracing: Tracing | None

    async def answer(
        self, jobs: Sequence[Job], *, timings: Timings, timeout_s: float | None = None
    ) -> list[Tensors]:
        """The engine's answers to the jobs, which become spans of the current request's trace."""
        with self.tracing.following([row for _, row in jobs]) if self.tracing else nullcontext():
            return await self.engine.answer_async(jobs, timeout_s=timeout_s, timed=timings.waited)

    def close(self) -> None:
        """Answer the accepted requests, for at most `grace_s`, and close everything."""
        self.repository.close()
        self.engine.close(timeout_s=self.settings.grace_s)
        if self.tracing is not None:
            self.tracing.close()


def components_of(request: Request) -> Components:
    """The components behind the application of this request, see `create_app`."""
    components: Components = request.app.state.components
    return components


def open_components(
    settings: Settings,
    processes: AllProcesses | None = None,
    opener: TrialOpener | None = None,
) -> Components:
    """Open the components for these settings.

    `processes` are all processes of the server; without them this is the only one. `opener` may
    have begun a trial.

    Every bundle is checked, its known answers are replayed, and its row counts are measured. Raises
    BundleError for a bundle that must not be served, ProviderUnavailable for a provider that is not
    installed, and StartFailed for other problems with the settings.
    """
    processes = processes or OneProcess()
    tracing = open_tracing(settings)
    metrics = Metrics(pid=os.getpid() if settings.workers > 1 else None)
    statistics = Statistics()

    opener = opener or TrialOpener.of(settings, shared_folder=processes.shared_folder)
    repository = Repository(
        settings.bundle,
        open_model=opener.open if settings.load_timeout_s > 0 else opener.open_untried,
        after_opening=opener.end_child,
        cancel_opening=opener.cancel,
        versions=settings.versions,
        control=settings.model_control,
        default_model=settings.default_model,
        unloaded=processes.unloaded,
        on_change=metrics.models_changed,
        on_swap=metrics.model_swapped,
    )
    repository.start()

    # Without a setting, every process gets its share of the CPU quota.
    quota_share = max(1, cpu_quota() // (settings.workers * settings.threads))
    engine = Engine(
        parallel=settings.parallel or quota_share,
        limits=Limits(
            queue_rows=settings.queue_rows,
            queue_bytes=settings.queue_bytes,
            queue_s=settings.queue_s,
            max_run_s=settings.max_run_s,
        ),
        content=content_of,
        observers=(metrics, statistics, ViolationLog(), *([tracing] if tracing else [])),
        proof_fraction=settings.proof_fraction,
    )
    processes.offer(
        {
            "load": repository.load,
            "unload": repository.unload,
            "statistics": statistics.records,
            "metrics": lambda: metrics.families(load=engine.load),
        }
    )
    repository.start_polling(settings.poll_s)
    return Components(
        settings=settings,
        repository=repository,
        engine=engine,
        metrics=metrics,
        statistics=statistics,
        health=Health(stuck_s=engine.stuck_s, grace_s=settings.stuck_grace_s),
        processes=processes,
        tracing=tracing,
    )
