"""What Prometheus reads at /metrics: requests, batches, the queue, models, determinism.

A single process keeps its figures in memory. Several, started with PROMETHEUS_MULTIPROC_DIR in
their environment, keep them in files of that folder, and each can answer for all.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from evalmode.service.batching.observer import Reason
from evalmode.service.models.open_models import Outcome
from evalmode.service.settings import METRICS_FOLDER_VARIABLE

if TYPE_CHECKING:
    from evalmode.service.batching.bucket import Bucket
    from evalmode.service.batching.limits import Load
    from evalmode.service.batching.observer import RanBatch
    from evalmode.service.batching.proof import Violation
    from evalmode.service.models.model import Model

REASONS = (
    "cancelled",
    "conflict",
    "deadline",
    "failed",
    "forbidden",
    "invalid",
    "not_ready",
    "queue_full",
    "request_timeout",
    "too_large",
    "too_many_connections",
    "unauthorized",
)

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = tuple(2**power for power in range(11))
_TOKENS = tuple(8 * 4**power for power in range(8))
_SHARES = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_WATCH_S = 1.0
_LAG_EVERY_S = 0.25  # every block of the event loop that is as long is seen; idle, it costs nothing
_LAG_WINDOW_S = 30.0  # longer than the usual interval of scrapes
_LIVE_FILE = re.compile(r"gauge_live\w*_(\d+)\.db")  # of a process that runs, by its id

_ModelLabels: TypeAlias = tuple[str, str, str]  # name, version, digest


@dataclass(frozen=True, kw_only=True)
class _BucketFigures:
    """The series of one bucket, looked up once."""

    waited: Histogram
    rows: Histogram
    tokens: Histogram
    padding: Histogram
    run: Histogram


class Metrics:
    """The figures of one server process, and with several processes those of all.

    An observer of the engine: its methods may be called from any thread, and are quick.
    """

    def __init__(self) -> None:
        # A creation time for each series doubles what is scraped.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._together = bool(os.environ.get(METRICS_FOLDER_VARIABLE))
        self._registry = CollectorRegistry()
        own = None if self._together else self._registry
        self._lock = threading.Lock()
        self._shown: frozenset[_ModelLabels] = frozenset()
        self._gone: set[str] = set()
        self._swapped: set[tuple[str, str]] = set()  # model and outcome
        self._buckets: dict[tuple[str, str], _BucketFigures] = {}
        self._answered: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._watching: threading.Thread | None = None
        self._watched = threading.Event()
        self._open_requests(own)
        self._open_batches(own)
        self._open_models(own)
        if self._together:
            families = [part for part in vars(self).values() if isinstance(part, MetricWrapperBase)]
            self._registry.register(_AllProcesses(families))
        else:
            ProcessCollector(registry=self._registry)

    def _open_requests(self, registry: CollectorRegistry | None) -> None:
        self._requests = Counter(
            "evalmode_requests",
            "Requests that were answered.",
            ("route", "method", "status"),
            registry=registry,
        )
        self._durations = Histogram(
            "evalmode_request_duration_seconds",
            "From the first byte of a request's headers to the last of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._in_flight = _gauge(
            "evalmode_in_flight_requests", "Requests being answered now.", registry, "livesum"
        )
        self._rejections = Counter(
            "evalmode_rejections",
            "Requests that got no answer, by why.",
            ("reason",),
            registry=registry,
        )
        for reason in REASONS:
            # Prometheus computes a rate only from a series that existed before.
            self._rejections.labels(reason)
        self._queue_rows = _gauge(
            "evalmode_queue_rows", "Rows that wait for a batch.", registry, "livesum"
        )
        self._queue_bytes = _gauge(
            "evalmode_queue_bytes", "Bytes of the rows that wait.", registry, "livesum"
        )
        self._running = _gauge(
            "evalmode_running_batches", "Batches that run now.", registry, "livesum"
        )
        self._loop_lag = Histogram(
            "evalmode_event_loop_lag_seconds",
            "How much later than due the event loop takes up what it has to do.",
            buckets=_SECONDS,
            registry=registry,
        )
        # Of several processes each has its own, for in a sum the one that is blocked does not show.
        self._longest_loop_lag = _gauge(
            "evalmode_event_loop_lag_max_seconds",
            f"The longest lag of the event loop in the last {_LAG_WINDOW_S:g} seconds.",
            registry,
            "liveall",
        )

    def _open_batches(self, registry: CollectorRegistry | None) -> None:
        def histogram(name: str, what: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(
                f"evalmode_{name}", what, ("model", "bucket"), buckets=buckets, registry=registry
            )

        self._waits = histogram(
            "queue_wait_seconds", "How long a row waited for its batch.", _SECONDS
        )
        self._rows = histogram(
            "batch_rows", "Rows of a batch, without copies that filled it up.", _ROWS
        )
        self._tokens = histogram("batch_tokens", "Tokens of a batch, without padding.", _TOKENS)
        self._padding = histogram(
            "batch_padding_ratio", "Share of a batch's positions that held nothing.", _SHARES
        )
        self._runs = histogram(
            "run_duration_seconds", "How long the model ran on a batch.", _SECONDS
        )
        self._dropped = Counter(
            "evalmode_dropped_rows",
            "Rows that were not answered, by why.",
            ("model", "reason"),
            registry=registry,
        )

    def _open_models(self, registry: CollectorRegistry | None) -> None:
        self._checks = Counter(
            "evalmode_determinism_checks",
            "Answers that were computed again, alone.",
            ("model",),
            registry=registry,
        )
        self._violations = Counter(
            "evalmode_determinism_violations",
            "Those that came out with other bits.",
            ("model",),
            registry=registry,
        )
        self._info = _gauge(
            "evalmode_model_info",
            "1 for each model that is loaded.",
            registry,
            "livemax",
            ("model", "version", "digest"),
        )
        self._loaded = _gauge(
            "evalmode_models_loaded", "How many models are loaded.", registry, "livemax"
        )
        self._swaps = Counter(
            "evalmode_model_swaps",
            "Versions that took over, or did not.",
            ("model", "outcome"),
            registry=registry,
        )

    # Called by the edge.

    def request_began(self) -> None:
        """The headers of a request have arrived."""
        self._in_flight.inc()

    def request_ended(
        self, *, route: str, method: str, status: int, duration_s: float, reason: str | None
    ) -> None:
        """It was answered. `route` is the template of its path, and `reason` one of REASONS where
        it was rejected.
        """
        self._in_flight.dec()
        series = self._answered.get((route, method, status))
        if series is None:
            series = self._requests.labels(route, method, status), self._durations.labels(route)
            self._answered[route, method, status] = series
        counter, durations = series
        counter.inc()
        durations.observe(duration_s)
        if reason is not None:
            self.rejected(reason)

    def rejected(self, reason: str) -> None:
        """A request got no answer, for one of REASONS; also one that was refused before all of it
        was read.
        """
        self._rejections.labels(reason).inc()

    # Called by the engine.

    def batch_ran(self, batch: RanBatch) -> None:
        """A batch was answered."""
        figures = self._of(batch.bucket)
        if figures is None:
            return
        for wait_s in batch.waited_s:
            figures.waited.observe(wait_s)
        tokens = sum(row.tokens for row in batch.rows)
        positions = batch.size * batch.bucket.positions
        figures.rows.observe(len(batch.rows))
        figures.tokens.observe(tokens)
        figures.padding.observe(max(0.0, 1 - tokens / positions))
        figures.run.observe(batch.run_s)

    def rows_dropped(self, reason: Reason, bucket: Bucket, rows: int) -> None:
        """Rows will not be answered."""
        with self._lock:
            if bucket.model not in self._gone:
                self._dropped.labels(bucket.model, reason).inc(rows)

    def proved(self, bucket: Bucket, violation: Violation | None) -> None:
        """An answer was computed again, alone; `violation` is set when its bits differed."""
        with self._lock:
            if bucket.model not in self._gone:
                self._checks.labels(bucket.model).inc()
                self._violations.labels(bucket.model).inc(violation is not None)

    # Called by the repository.

    def show_models(self, models: Iterable[Model]) -> None:
        """These and no others are loaded now. In a single process the series of a model end when
        its last version is unloaded.
        """
        with self._lock:
            now = frozenset((model.name, model.version, model.digest) for model in models)
            for labels in self._shown - now:
                self._hide(labels)
            names = {name for name, _, _ in now}
            names_before = {name for name, _, _ in self._shown}
            self._gone = (self._gone | names_before) - names
            for labels in now:
                self._info.labels(*labels).set(1)
            for name in names:
                # As with REASONS: a series begins before its first event.
                self._checks.labels(name)
                self._violations.labels(name)
                for reason in get_args(Reason):
                    self._dropped.labels(name, reason)
                for outcome in get_args(Outcome):
                    self._swaps.labels(name, outcome)
            self._loaded.set(len(now))
            if not self._together:
                self._forget(names_before - names)
            self._shown = now

    def model_swapped(self, model: str, outcome: Outcome) -> None:
        """A version of the model was loaded, unloaded or refused."""
        with self._lock:
            self._swapped.add((model, outcome))
            self._swaps.labels(model, outcome).inc()

    # For Prometheus.

    def render(self, accept: str, *, load: Load | None = None) -> tuple[bytes, str]:
        """The figures and their content type, in the form that the `Accept` header asks for.

        `load` is the engine's load now. With several processes this reads files, so do not call it
        on an event loop.
        """
        if load is not None:
            self._show_load(load)
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def watch(self, load: Callable[[], Load]) -> None:
        """With several processes: write this one's load to its file every second, for the process
        that renders the figures.
        """
        if not self._together:
            return

        def show_regularly() -> None:
            while not self._watched.wait(_WATCH_S):
                self._show_load(load())

        self._show_load(load())
        self._watching = threading.Thread(target=show_regularly, name="metrics", daemon=True)
        self._watching.start()

    async def measure_loop_lag(self) -> None:
        """Measure how late the running event loop is, a few times a second, until cancelled."""
        recent_s: deque[float] = deque(maxlen=round(_LAG_WINDOW_S / _LAG_EVERY_S))
        while True:
            # Not by the loop's own clock: uvloop reads it once a turn, and in milliseconds.
            due_s = time.perf_counter() + _LAG_EVERY_S
            await asyncio.sleep(_LAG_EVERY_S)
            lag_s = max(0.0, time.perf_counter() - due_s)
            self._loop_lag.observe(lag_s)
            recent_s.append(lag_s)
            self._longest_loop_lag.set(max(recent_s))

    def close(self) -> None:
        """Stop watching."""
        self._watched.set()
        if self._watching is not None:
            self._watching.join()

    def _show_load(self, load: Load) -> None:
        self._queue_rows.set(load.waiting_rows)
        self._queue_bytes.set(load.waiting_bytes)
        self._running.set(load.running_batches)

    def _of(self, bucket: Bucket) -> _BucketFigures | None:
        names = bucket.model, bucket.label
        figures = self._buckets.get(names)
        if figures is not None:
            return figures
        with self._lock:
            if bucket.model in self._gone:
                # Its last batch ended after it was unloaded: a new series would stay forever.
                return None
            figures = _BucketFigures(
                waited=self._waits.labels(*names),
                rows=self._rows.labels(*names),
                tokens=self._tokens.labels(*names),
                padding=self._padding.labels(*names),
                run=self._runs.labels(*names),
            )
            self._buckets[names] = figures
            return figures

    def _hide(self, labels: _ModelLabels) -> None:
        if self._together:
            # A series cannot be removed from the files of several processes; 0 is not shown.
            self._info.labels(*labels).set(0)
        else:
            self._info.remove(*labels)

    def _forget(self, names: Collection[str]) -> None:
        for name in names:
            for key in [key for key in self._buckets if key[0] == name]:
                del self._buckets[key]
            for family in (self._waits, self._rows, self._tokens, self._padding, self._runs):
                family.remove_by_labels({"model": name})
            for counter in (self._dropped, self._checks, self._violations):
                counter.remove_by_labels({"model": name})
            for outcome in get_args(Outcome):  # what happened to a model is told after its end
                if (name, outcome) not in self._swapped:
                    self._swaps.remove(name, outcome)


class _AllProcesses(Collector):
    """The figures of every process that shares the folder, and what /proc says of each that
    runs. Of `families`, those that no process has counted in yet are there without figures.
    """

    def __init__(self, families: Sequence[MetricWrapperBase]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        missing = {family.name: family for part in self._families for family in part.describe()}
        for metric in MultiProcessCollector(None).collect():  # type: ignore[no-untyped-call]
            missing.pop(metric.name, None)
            if metric.name == "evalmode_model_info":
                metric.samples = [sample for sample in metric.samples if sample.value]
            yield metric
        yield from missing.values()
        yield from _process_figures(Path(os.environ[METRICS_FOLDER_VARIABLE]))


def _process_figures(folder: Path) -> Iterable[Metric]:
    """Memory, CPU time, open files and more of the processes that keep figures in this folder."""
    live_files = (_LIVE_FILE.fullmatch(file.name) for file in folder.iterdir())
    families: dict[str, Metric] = {}
    for pid in sorted({match[1] for match in live_files if match}, key=int):
        for family in ProcessCollector(pid=partial(str, pid), registry=None).collect():
            merged = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                merged.add_sample(sample.name, {"pid": pid}, sample.value)
    return families.values()


def _gauge(
    name: str,
    what: str,
    registry: CollectorRegistry | None,
    mode: Literal["livesum", "livemax", "liveall"],
    labels: Sequence[str] = (),
) -> Gauge:
    return Gauge(name, what, labels, registry=registry, multiprocess_mode=mode)
