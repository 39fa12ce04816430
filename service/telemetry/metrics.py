"""The metrics that Prometheus reads at /metrics: requests, batches, the queue, models, determinism.

Each process has its figures in memory. With several processes, `figures.py` adds them up.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from evalmode.service.batching.observer import Reason
from evalmode.service.models.open_models import Outcome
from evalmode.service.telemetry.histogram import Histogram, Series

if TYPE_CHECKING:
    from evalmode.service.batching.bucket import Bucket
    from evalmode.service.batching.limits import Load
    from evalmode.service.batching.observer import RanBatch
    from evalmode.service.batching.proof import Violation
    from evalmode.service.models.model import Model

# Why requests are rejected.
REASONS = (
    "cancelled",
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

# The bounds of the histograms: seconds, rows, tokens, and shares from 0 to 1.
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = tuple(2**power for power in range(11))
_TOKENS = tuple(8 * 4**power for power in range(8))
_SHARES = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

# How often the lag of the event loop is measured. Every longer block is noticed, and an idle loop
# spends no time on it.
_LAG_EVERY_S = 0.25
# The time over which the longest lag is reported: longer than the usual interval of scrapes.
_LAG_WINDOW_S = 30.0
_LONGEST_LAG = "evalmode_event_loop_lag_max_seconds"

_ModelLabels: TypeAlias = tuple[str, str, str]  # name, version, digest


@dataclass(frozen=True, kw_only=True)
class _BucketFigures:
    """The series of one bucket. Looking them up by their labels costs time for each batch."""

    waited: Series
    rows: Series
    tokens: Series
    padding: Series
    run: Series


class Metrics:
    """The metrics of a server process. `pid` is its id if it is one of several.

    An observer of the engine. Its methods are quick and may be called from any thread.
    """

    def __init__(self, *, pid: int | None = None) -> None:
        # A creation time for each series would double the size of a scrape.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._lock = threading.Lock()
        # The models that are loaded now.
        self._loaded_models: frozenset[_ModelLabels] = frozenset()
        # The names of models that were loaded and are no longer.
        self._unloaded_names: set[str] = set()
        # The swaps that happened, by model and outcome.
        self._swapped: set[tuple[str, str]] = set()
        # Series that were looked up, by model and bucket, and by route, method and status.
        self._buckets: dict[tuple[str, str], _BucketFigures] = {}
        self._answered: dict[tuple[str, str, int], tuple[Counter, Series]] = {}
        # A sum would hide the process that is blocked, or that holds the memory.
        self._process_labels = {} if pid is None else {"pid": str(pid)}

        self._open_requests(self._registry)
        self._open_batches(self._registry)
        self._open_models(self._registry)
        ProcessCollector(registry=self._registry)

    def _open_requests(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "evalmode_requests",
            "Answered requests.",
            ("route", "method", "status"),
            registry=registry,
        )
        self._durations = Histogram(
            "evalmode_request_duration_seconds",
            "From the first byte of a request's headers to the last byte of its answer.",
            ("route",),
            bounds=_SECONDS,
            registry=registry,
        )
        self._in_flight = Gauge(
            "evalmode_in_flight_requests", "Requests that are being answered.", registry=registry
        )
        self._rejections = Counter(
            "evalmode_rejections",
            "Rejected requests, by reason.",
            ("reason",),
            registry=registry,
        )
        # A series begins at 0: Prometheus computes no rate from a first value of 1.
        for reason in REASONS:
            self._rejections.labels(reason)
        self._queue_rows = Gauge(
            "evalmode_queue_rows", "Rows that wait for a batch.", registry=registry
        )
        self._queue_bytes = Gauge(
            "evalmode_queue_bytes", "Bytes of the rows that wait.", registry=registry
        )
        self._running = Gauge(
            "evalmode_running_batches", "Batches that are running.", registry=registry
        )
        self._loop_lag = Histogram(
            "evalmode_event_loop_lag_seconds",
            "How late the event loop runs a task that is due.",
            bounds=_SECONDS,
            registry=registry,
        )
        self._longest_loop_lag = Gauge(
            _LONGEST_LAG,
            f"The longest lag of the event loop in the last {_LAG_WINDOW_S:g} seconds.",
            registry=registry,
        )

    def _open_batches(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, bounds: Sequence[float]) -> Histogram:
            return Histogram(
                f"evalmode_{name}", text, ("model", "bucket"), bounds=bounds, registry=registry
            )

        self._waits = histogram(
            "queue_wait_seconds", "How long a row waited for its batch.", _SECONDS
        )
        self._rows = histogram(
            "batch_rows", "Rows of a batch, without the copies that fill it.", _ROWS
        )
        self._tokens = histogram("batch_tokens", "Tokens of a batch, without padding.", _TOKENS)
        self._padding = histogram(
            "batch_padding_ratio",
            "Share of a batch's positions that are padding or copies.",
            _SHARES,
        )
        self._runs = histogram(
            "run_duration_seconds", "How long the model ran on a batch.", _SECONDS
        )
        self._dropped = Counter(
            "evalmode_dropped_rows",
            "Rows that were not answered, by reason.",
            ("model", "reason"),
            registry=registry,
        )

    def _open_models(self, registry: CollectorRegistry) -> None:
        self._checks = Counter(
            "evalmode_determinism_checks",
            "Answers that were computed again, the row alone.",
            ("model",),
            registry=registry,
        )
        self._violations = Counter(
            "evalmode_determinism_violations",
            "Answers that had other bits when they were computed again.",
            ("model",),
            registry=registry,
        )
        self._info = Gauge(
            "evalmode_model_info",
            "1 for each model that is loaded.",
            ("model", "version", "digest"),
            registry=registry,
        )
        self._loaded = Gauge(
            "evalmode_models_loaded", "How many models are loaded.", registry=registry
        )
        self._swaps = Counter(
            "evalmode_model_swaps",
            "Versions of a model that were loaded, unloaded or refused.",
            ("model", "outcome"),
            registry=registry,
        )

    # Called by the middleware.

    def request_began(self) -> None:
        """The headers of a request have arrived."""
        self._in_flight.inc()

    def request_ended(
        self, *, route: str, method: str, status: int, duration_s: float, reason: str | None
    ) -> None:
        """A request was answered.

        `route` is the template of its path. `reason` is one of REASONS if it was rejected, else
        None.
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
        """A request was rejected, for one of REASONS, perhaps before all of it was read."""
        self._rejections.labels(reason).inc()

    # Called by the engine.

    def batch_ran(self, batch: RanBatch) -> None:
        """A batch was answered."""
        figures = self._figures_of(batch.bucket)
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
            if bucket.model not in self._unloaded_names:
                self._dropped.labels(bucket.model, reason).inc(rows)

    def proved(self, bucket: Bucket, violation: Violation | None) -> None:
        """An answer was computed again, the row alone; `violation` is set if its bits differed."""
        with self._lock:
            if bucket.model not in self._unloaded_names:
                self._checks.labels(bucket.model).inc()
                self._violations.labels(bucket.model).inc(violation is not None)

    # Called by the repository.

    def models_changed(self, models: Iterable[Model]) -> None:
        """These models are loaded now, and no others.

        The series of a model end when its last version is unloaded.
        """
        with self._lock:
            before = self._loaded_models
            now = frozenset((model.name, model.version, model.digest) for model in models)
            names = {name for name, _, _ in now}
            names_before = {name for name, _, _ in before}
            self._loaded_models = now
            self._unloaded_names = (self._unloaded_names | names_before) - names

            for labels in before - now:
                self._info.remove(*labels)
            for labels in now:
                self._info.labels(*labels).set(1)
            self._loaded.set(len(now))

            # A series begins at 0, before its first event, as with REASONS.
            for name in names:
                self._checks.labels(name)
                self._violations.labels(name)
                for reason in get_args(Reason):
                    self._dropped.labels(name, reason)
                for outcome in get_args(Outcome):
                    self._swaps.labels(name, outcome)

            self._forget(names_before - names)

    def model_swapped(self, model: str, outcome: Outcome) -> None:
        """A version of the model was loaded, unloaded or refused."""
        with self._lock:
            self._swapped.add((model, outcome))
            self._swaps.labels(model, outcome).inc()

    # For Prometheus.

    def families(self, *, load: Load | None = None) -> list[dict[str, Any]]:
        """All metrics as plain JSON values, see `figures.py`. `load` is the engine's load now."""
        if load is not None:
            self._queue_rows.set(load.waiting_rows)
            self._queue_bytes.set(load.waiting_bytes)
            self._running.set(load.running_batches)
        families = []
        for metric in self._registry.collect():
            is_of_process = metric.name.startswith("process_") or metric.name == _LONGEST_LAG
            labels_of_process = self._process_labels if is_of_process else {}
            samples = [
                [sample.name, {**sample.labels, **labels_of_process}, sample.value]
                for sample in metric.samples
            ]
            families.append(
                {
                    "name": metric.name,
                    "documentation": metric.documentation,
                    "type": metric.type,
                    "samples": samples,
                }
            )
        return families

    async def measure_loop_lag(self) -> None:
        """Measure how late the running event loop is, a few times a second, until cancelled."""
        recent_s: deque[float] = deque(maxlen=round(_LAG_WINDOW_S / _LAG_EVERY_S))
        while True:
            # Not by the loop's own clock: uvloop reads it once a turn, and in milliseconds.
            due_s = time.perf_counter() + _LAG_EVERY_S
            await asyncio.sleep(_LAG_EVERY_S)
            lag_s = max(0.0, time.perf_counter() - due_s)
            self._loop_lag.labels().observe(lag_s)
            recent_s.append(lag_s)
            self._longest_loop_lag.set(max(recent_s))

    def _figures_of(self, bucket: Bucket) -> _BucketFigures | None:
        """The series of a bucket; None if its model was unloaded."""
        labels = bucket.model, bucket.label
        figures = self._buckets.get(labels)
        if figures is not None:
            return figures
        with self._lock:
            # The last batch of a model may end after it was unloaded. A new series would stay
            # forever.
            if bucket.model in self._unloaded_names:
                return None
            figures = _BucketFigures(
                waited=self._waits.labels(*labels),
                rows=self._rows.labels(*labels),
                tokens=self._tokens.labels(*labels),
                padding=self._padding.labels(*labels),
                run=self._runs.labels(*labels),
            )
            self._buckets[labels] = figures
            return figures

    def _forget(self, names: Collection[str]) -> None:
        """Remove the series of models. Swaps that happened stay: they are reported afterwards."""
        for name in names:
            for labels in [labels for labels in self._buckets if labels[0] == name]:
                del self._buckets[labels]
            for family in (self._waits, self._rows, self._tokens, self._padding, self._runs):
                family.remove_by_labels({"model": name})
            for counter in (self._dropped, self._checks, self._violations):
                counter.remove_by_labels({"model": name})
            for outcome in get_args(Outcome):
                if (name, outcome) not in self._swapped:
                    self._swaps.remove(name, outcome)


def render(families: Iterable[Mapping[str, Any]], accept: str) -> tuple[bytes, str]:
    """Families and their content type, in the form that the `Accept` header asks for."""
    encode, content_type = choose_encoder(accept)
    return encode(_Families(families)), content_type


class _Families(Collector):
    """Families of plain JSON values, as an encoder reads them."""

    def __init__(self, families: Iterable[Mapping[str, Any]]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        for family in self._families:
            metric = Metric(family["name"], family["documentation"], family["type"])
            for name, labels, value in family["samples"]:
                metric.add_sample(name, labels, value)
            yield metric
