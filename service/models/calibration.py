"""Which batch sizes may run, and how long each takes, measured when a model is loaded.

Whether a size gives a row the bits that it has alone is measured at every load, on this machine.

How long it takes is measured too, and cached, because one short measurement beside other work is
imprecise. The smallest time in the cache counts, so the sizes stay the same from start to start.

The padded lengths are in bundle/frontend.py.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from evalmode import CACHE
from evalmode.atomic_files import write_file
from evalmode.bundle.certificate import Platform
from evalmode.bundle.errors import BundleError
from evalmode.bundle.frontend import FrontEnd
from evalmode.bundle.known_answers import KnownAnswer, Run, Tensors, bits
from evalmode.bundle.row_counts import rows_by_length, timed_row_counts

# The batch sizes that are measured. Powers of two: at most half of a filled batch is copies.
ROW_COUNTS = (1, 2, 4, 8, 16, 32)

# Rows to measure with, of each padded length: two full ones, and two that are mostly padding.
_ROWS_OF_A_LENGTH = 4
# Texts to measure with if the bundle has no known answers.
_FALLBACK_TEXTS = ("A text to measure with, where the bundle holds none of its own.", "1")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MeasuredBucket:
    """The measurements of one bucket.

    Attributes:
        stable: the batch sizes at which a row has the bits that it has alone.
        costs: seconds of a batch, by its size, for the stable sizes that are efficient.
    """

    stable: tuple[int, ...]
    costs: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a model is measured.

    Attributes:
        budget_s: seconds that measuring may take.
        cache: the folder where timings are cached; None for evalmode's own cache folder.
    """

    budget_s: float = 1.0
    cache: Path | None = None

    def __post_init__(self) -> None:
        # Not `budget_s < 0`: NaN must be refused too.
        if not self.budget_s >= 0:
            raise ValueError(f"budget_s must be at least 0, got {self.budget_s}")

    def measure(
        self,
        run: Run,
        rows: Mapping[str, Sequence[Tensors]],
        *,
        path: Path,
        digest: str,
        platform: Platform,
    ) -> dict[str, MeasuredBucket]:
        """The batch sizes of ROW_COUNTS that may run in each bucket. `rows` are single rows, by the
        label of their bucket, and so is the result.

        A row alone is always measured. A size that the budget does not reach is not measured, so it
        never runs. A size whose time is in the cache runs only to compare its bits, which spares
        two thirds of the runs. Raises BundleError if a row alone does not repeat its own bits.
        """
        cache = _TimingsCache.of(self.cache, digest=digest, platform=platform)
        cached = cache.read()
        end = time.monotonic() + self.budget_s
        timings: dict[str, dict[int, float]] = {}
        for index, (label, bucket_rows) in enumerate(rows.items()):
            # What is left of the budget is shared among the buckets that are left.
            budget_s = max(0.0, end - time.monotonic()) / (len(rows) - index)
            timings[label] = timed_row_counts(
                run, bucket_rows, ROW_COUNTS, budget_s=budget_s, well_timed=cached.get(label, {})
            )
            if 1 not in timings[label]:
                raise _not_repeatable(path, f"one row of {label}")

        measured: dict[str, MeasuredBucket] = {}
        for label, smallest in cache.merge(timings).items():
            stable = tuple(timings[label])
            measured[label] = MeasuredBucket(stable=stable, costs=efficient(smallest))
        return measured


def slowest_run_s(run: Run, requests: Sequence[Tensors], *, path: Path) -> float | None:
    """Seconds of the slowest of `requests`, each run as it is; None without requests.

    Raises BundleError if one does not repeat its own bits.
    """
    slowest_s = None
    for inputs in requests:
        # The first run is not timed: ONNX Runtime allocates its memory there.
        first = run(inputs)
        began = time.perf_counter()
        second = run(inputs)
        slowest_s = max(slowest_s or 0.0, time.perf_counter() - began)
        if any(bits(first[name]) != bits(tensor) for name, tensor in second.items()):
            raise _not_repeatable(path, "a request")
    return slowest_s


def efficient(timings: Mapping[int, float]) -> dict[int, float]:
    """The batch sizes with a lower cost per row than all smaller ones, each with its seconds.

    >>> efficient({1: 1.0, 2: 1.2, 4: 2.4})
    {1: 1.0, 2: 1.2}
    """
    costs: dict[int, float] = {}
    for size in sorted(timings):
        if all(timings[size] / size < seconds / smaller for smaller, seconds in costs.items()):
            costs[size] = timings[size]
    return costs


def every_size(measured: MeasuredBucket) -> dict[int, float]:
    """The seconds of every batch size from 1 to the largest measured one, for an exact model.

    It is proved that such a model keeps the bits of a row at any size, so no copies have to fill a
    batch. The times between two efficient sizes are interpolated.

    The measurement checks the proof: where a size did not keep the bits, only the measured sizes
    may run.

    >>> every_size(MeasuredBucket(stable=(1, 2, 4), costs={1: 1.0, 2: 1.2, 4: 2.0}))
    {1: 1.0, 2: 1.2, 3: 1.6, 4: 2.0}
    """
    expected = tuple(size for size in ROW_COUNTS if size <= max(measured.stable))
    if measured.stable != expected:
        return dict(measured.costs)
    sizes = sorted(measured.costs)
    costs = {sizes[0]: measured.costs[sizes[0]]}
    for smaller, larger in pairwise(sizes):
        first, last = measured.costs[smaller], measured.costs[larger]
        for size in range(smaller + 1, larger + 1):
            costs[size] = first + (last - first) * (size - smaller) / (larger - smaller)
    return costs


def text_rows_to_measure(
    answers: Sequence[KnownAnswer], *, frontend: FrontEnd, inputs: Collection[str]
) -> dict[str, list[Tensors]]:
    """A few rows of each padded length, by its label, made of the texts of the known answers. Each
    row has the tensors of `inputs`, the names of the model's inputs.
    """
    texts = [answer.text for answer in answers if answer.text is not None] or list(_FALLBACK_TEXTS)
    ids = [frontend.encode(text).ids for text in texts]
    rows: dict[str, list[Tensors]] = {}
    for length, padded_rows in rows_by_length(ids, frontend.spec, each=_ROWS_OF_A_LENGTH).items():
        rows[str(length)] = []
        for row in padded_rows:
            # A graph may take no attention mask.
            tensors = {name: tensor for name, tensor in row.items() if name in inputs}
            rows[str(length)].append(tensors)
    return rows


@dataclass(frozen=True, kw_only=True)
class _TimingsCache:
    """The smallest seconds ever measured for a bundle on a platform: in JSON, by the bucket's label
    and the batch size. The file may be deleted at any time. None for no cache.
    """

    file: Path | None

    @classmethod
    def of(cls, cache: Path | None, *, digest: str, platform: Platform) -> _TimingsCache:
        """The cache of this bundle on this platform, in the folder `cache` or the default one."""
        identity = json.dumps([digest, platform.model_dump(mode="json"), ROW_COUNTS])
        fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        try:
            folder = cache or Path(CACHE).expanduser()
        except RuntimeError:
            # The user has no home folder, as in some containers.
            return cls(file=None)
        return cls(file=folder / "calibration" / f"{fingerprint}.json")

    def merge(self, timings: Mapping[str, Mapping[int, float]]) -> dict[str, dict[int, float]]:
        """`timings`, each lowered to the smallest in the cache. New smallest ones are written."""
        cached = self.read()
        # What was not measured this time stays in the cache.
        merged = copy.deepcopy(cached)
        smallest: dict[str, dict[int, float]] = {}
        for label, seconds_by_size in timings.items():
            smallest[label] = {}
            for size, seconds in seconds_by_size.items():
                cached_s = cached.get(label, {}).get(size, math.inf)
                smallest[label][size] = min(seconds, cached_s)
            merged.setdefault(label, {}).update(smallest[label])
        if self.file is not None and merged != cached:
            try:
                write_file(self.file, json.dumps(merged).encode())
            except OSError as error:
                # A read-only file system, or another process that writes the same file at this
                # moment.
                _log.debug("timings cannot be cached in %s: %s", self.file, error)
        return smallest

    def read(self) -> dict[str, dict[int, float]]:
        """The timings of the file; empty if it is missing or not such a file."""
        if self.file is None:
            return {}
        timings: dict[str, dict[int, float]] = {}
        try:
            for label, seconds_by_size in json.loads(self.file.read_bytes()).items():
                timings[label] = {}
                for size, seconds in seconds_by_size.items():
                    if 0 < seconds < math.inf:
                        timings[label][int(size)] = float(seconds)
            return timings
        except FileNotFoundError:
            return {}
        # All that the lines above raise for JSON of another structure.
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            _log.debug("cached timings cannot be read from %s: %s", self.file, error)
            return {}


def measured_to_json(measured: Mapping[str, MeasuredBucket]) -> dict[str, Any]:
    """The measurements of the buckets of a model, for another process."""
    # The keys of a JSON object are strings, so the costs are pairs.
    return {
        label: {"stable": bucket.stable, "costs": list(bucket.costs.items())}
        for label, bucket in measured.items()
    }


def measured_from_json(values: Mapping[str, Any]) -> dict[str, MeasuredBucket]:
    """The measurements that `measured_to_json` wrote."""
    return {
        label: MeasuredBucket(stable=tuple(bucket["stable"]), costs=dict(bucket["costs"]))
        for label, bucket in values.items()
    }


def _not_repeatable(path: Path, subject: str) -> BundleError:
    return BundleError(
        f"{path} gives {subject} other bits each time it runs: this model or this execution"
        " provider is not deterministic, so none of its answers would be reliable"
    )
