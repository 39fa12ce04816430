"""Counts and durations of each model version, for the protocol's statistics extension.

The engine reports batches and waits, and the routes report the end of each request. Both may do so
from any thread.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from evalmode.service.batching.observer import Observer, RanBatch

# Versions come and go. Above this number, the figures that were unused for longest are dropped.
_MAX_VERSIONS = 1_000

_NANOSECONDS = 1_000_000_000


@dataclass(kw_only=True)
class _Duration:
    """How often something happened, and how long it took altogether."""

    count: int = 0
    ns: int = 0

    def add(self, duration_s: float, *, count: int = 1) -> None:
        self.count += count
        self.ns += round(duration_s * _NANOSECONDS)

    def as_json(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


@dataclass(kw_only=True)
class _Figures:
    """The figures of one model version."""

    last_ms: int = 0
    rows: int = 0
    batches: int = 0
    success: _Duration = field(default_factory=_Duration)
    fail: _Duration = field(default_factory=_Duration)
    queue: _Duration = field(default_factory=_Duration)
    compute_input: _Duration = field(default_factory=_Duration)
    compute_infer: _Duration = field(default_factory=_Duration)
    compute_output: _Duration = field(default_factory=_Duration)
    by_rows: dict[int, _Duration] = field(default_factory=dict)

    def as_json(self, name: str, version: str) -> dict[str, Any]:
        # The protocol demands the keys that are 0: no answer is cached, and a batch is timed whole.
        zero = _Duration().as_json()
        return {
            "name": name,
            "version": version,
            "last_inference": self.last_ms,
            "inference_count": self.rows,
            "execution_count": self.batches,
            "inference_stats": {
                "success": self.success.as_json(),
                "fail": self.fail.as_json(),
                "queue": self.queue.as_json(),
                "compute_input": self.compute_input.as_json(),
                "compute_infer": self.compute_infer.as_json(),
                "compute_output": self.compute_output.as_json(),
                "cache_hit": zero,
                "cache_miss": zero,
            },
            "batch_stats": [
                {
                    "batch_size": rows,
                    "compute_input": zero,
                    "compute_infer": duration.as_json(),
                    "compute_output": zero,
                }
                for rows, duration in sorted(self.by_rows.items())
            ],
        }


class Statistics(Observer):
    """The figures of every model version since this process began; an observer of the engine."""

    def __init__(self, *, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._figures: OrderedDict[tuple[str, str], _Figures] = OrderedDict()

    def request_succeeded(
        self, name: str, version: str, *, took_s: float, read_s: float, write_s: float
    ) -> None:
        """A request was answered in `took_s` seconds. Of these, reading its tensors took `read_s`
        and writing its answer `write_s`.
        """
        with self._lock:
            figures = self._figures_of(name, version)
            figures.success.add(took_s)
            figures.compute_input.add(read_s)
            figures.compute_output.add(write_s)

    def request_failed(self, name: str, version: str, *, took_s: float) -> None:
        """A request to this version was refused or failed, `took_s` seconds after it arrived."""
        with self._lock:
            self._figures_of(name, version).fail.add(took_s)

    def records(self) -> list[dict[str, Any]]:
        """The record of each model version that had a request, as plain JSON values."""
        with self._lock:
            return [figures.as_json(*identity) for identity, figures in self._figures.items()]

    def batch_ran(self, batch: RanBatch) -> None:
        """The engine ran a batch."""
        rows = len(batch.rows)
        with self._lock:
            figures = self._figures_of(batch.bucket.model, batch.bucket.version)
            figures.last_ms = int(self._now() * 1000)
            figures.rows += rows
            figures.batches += 1
            figures.queue.add(sum(batch.waited_s), count=rows)
            figures.compute_infer.add(batch.run_s, count=rows)
            if rows not in figures.by_rows:
                figures.by_rows[rows] = _Duration()
            figures.by_rows[rows].add(batch.run_s)

    def _figures_of(self, name: str, version: str) -> _Figures:
        """The figures of a version, as the most recently used ones; new ones if it has none."""
        key = (name, version)
        figures = self._figures.get(key)
        if figures is None:
            figures = self._figures[key] = _Figures()
        self._figures.move_to_end(key)
        if len(self._figures) > _MAX_VERSIONS:
            self._figures.popitem(last=False)
        return figures


def new_record(name: str, version: str) -> dict[str, Any]:
    """The record of a model version before its first request: all figures are 0."""
    return _Figures().as_json(name, version)


def add_records(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of several processes, added up: one for each model version.

    Above the limit of versions, those whose last inference is the oldest are dropped.
    """
    sums: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        identity = record["name"], record["version"]
        sums[identity] = _sum(sums[identity], record) if identity in sums else record
    newest_first = sorted(sums.values(), key=lambda record: -record["last_inference"])
    return newest_first[:_MAX_VERSIONS]


def _sum(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two objects of records, added up at every depth."""
    result: dict[str, Any] = {}
    for key, value in first.items():
        other = second[key]
        if key == "last_inference":
            result[key] = max(value, other)
        elif key == "batch_stats":
            by_size = {batch["batch_size"]: batch for batch in value}
            for batch in other:
                size = batch["batch_size"]
                by_size[size] = _sum(by_size[size], batch) if size in by_size else batch
            result[key] = [by_size[size] for size in sorted(by_size)]
        elif isinstance(value, Mapping):
            result[key] = _sum(value, other)
        elif key in ("name", "version", "batch_size"):
            result[key] = value
        else:
            result[key] = value + other
    return result
