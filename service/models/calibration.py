"""Which batch sizes may run, and what each costs, measured when a model is loaded.

Whether a batch size keeps a row's bits is measured at every load, on this machine. Its cost is
measured too, and cached in a folder, because one short measurement beside other work is imprecise.
The smallest cost ever seen counts, so the choice of batch sizes stays the same from start to start.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evalmode import CACHE
from evalmode.atomic_files import write_file
from evalmode.bundle.certificate import Platform
from evalmode.bundle.errors import BundleError
from evalmode.bundle.frontend import FrontEnd
from evalmode.bundle.known_answers import KnownAnswer, Run, Tensors, bits
from evalmode.bundle.row_counts import rows_by_length, timed_row_counts

ROW_COUNTS = (1, 2, 4, 8, 16, 32)

_ROWS = 4  # of each length: two full, two mostly padding
_FALLBACK = ("A text to measure with, where the bundle holds none of its own.", "1")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MeasuredBucket:
    """The measurements of one bucket.

    Attributes:
        stable: the row counts at which a row has the bits it has alone.
        costs: seconds of a batch, for those of them with a lower cost per row than every smaller
            one.
    """

    stable: tuple[int, ...]
    costs: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How long measuring a model may take, and where timings are cached (None:
    `~/.cache/evalmode`).
    """

    budget_s: float = 1.0
    cache: Path | None = None

    def __post_init__(self) -> None:
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
        """For each bucket, by its label, the row counts of ROW_COUNTS that may run.

        A row alone is always measured. A row count that the budget does not reach is not proven and
        never runs.
        Raises BundleError when a row alone does not repeat its own bits.
        """
        end = time.monotonic() + self.budget_s
        timings: dict[str, dict[int, float]] = {}
        for index, (label, bucket_rows) in enumerate(rows.items()):
            budget_s = max(0.0, end - time.monotonic()) / (len(rows) - index)
            timings[label] = timed_row_counts(run, bucket_rows, ROW_COUNTS, budget_s=budget_s)
            if 1 not in timings[label]:
                raise _not_repeatable(path, f"one row of {label}")
        best = _TimingsCache.of(self.cache, digest=digest, platform=platform).merge(timings)
        return {
            label: MeasuredBucket(stable=tuple(timings[label]), costs=worthwhile(best[label]))
            for label in timings
        }


def alone_s(run: Run, requests: Sequence[Tensors], *, path: Path) -> float | None:
    """Seconds of the slowest of `requests`, each run as it is; None without any.

    Raises BundleError when one does not repeat its own bits.
    """
    slowest_s = None
    for inputs in requests:
        first = run(inputs)
        began = time.perf_counter()
        second = run(inputs)
        slowest_s = max(slowest_s or 0.0, time.perf_counter() - began)
        if any(bits(first[name]) != bits(tensor) for name, tensor in second.items()):
            raise _not_repeatable(path, "a request")
    return slowest_s


def worthwhile(timings: Mapping[int, float]) -> dict[int, float]:
    """The row counts with a lower cost per row than every smaller one."""
    costs: dict[int, float] = {}
    for count in sorted(timings):
        if all(timings[count] / count < seconds / smaller for smaller, seconds in costs.items()):
            costs[count] = timings[count]
    return costs


def text_rows_to_measure(
    answers: Sequence[KnownAnswer], *, frontend: FrontEnd
) -> dict[str, list[Tensors]]:
    """A few rows for every padded length, by its label, made of the ids of the known answers'
    texts.
    """
    texts = [answer.text for answer in answers if answer.text is not None] or list(_FALLBACK)
    ids = [frontend.encode(text).ids for text in texts]
    rows = rows_by_length(ids, frontend.spec, each=_ROWS)
    return {str(length): rows_of_length for length, rows_of_length in rows.items()}


@dataclass(frozen=True, kw_only=True)
class _TimingsCache:
    """The smallest seconds ever seen of this bundle on this platform. Losing the file does no
    harm.
    """

    file: Path | None

    @classmethod
    def of(cls, cache: Path | None, *, digest: str, platform: Platform) -> _TimingsCache:
        identity = json.dumps([digest, platform.model_dump(mode="json"), ROW_COUNTS])
        fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        try:
            folder = cache or Path(CACHE).expanduser()
        except RuntimeError:  # a user without a home
            return cls(file=None)
        return cls(file=folder / "calibration" / f"{fingerprint}.json")

    def merge(self, timings: Mapping[str, Mapping[int, float]]) -> dict[str, dict[int, float]]:
        """`timings`, each lowered to the smallest known; new smallest ones are written back."""
        known = self._read()
        best: dict[str, dict[int, float]] = {}
        for label, seconds_by_count in timings.items():
            known_seconds = known.get(label, {})
            best[label] = {
                count: min(seconds, known_seconds.get(count, math.inf))
                for count, seconds in seconds_by_count.items()
            }
        merged = {
            label: {**known.get(label, {}), **best.get(label, {})} for label in (*known, *best)
        }
        if merged != known:
            self._write(merged)
        return best

    def _read(self) -> dict[str, dict[int, float]]:
        if self.file is None:
            return {}
        try:
            timings = json.loads(self.file.read_bytes())
            return {
                str(label): {
                    int(count): float(seconds)
                    for count, seconds in costs.items()
                    if 0 < seconds < math.inf
                }
                for label, costs in timings.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            _log.debug("kept timings cannot be read from %s: %s", self.file, error)
            return {}

    def _write(self, timings: Mapping[str, Mapping[int, float]]) -> None:
        if self.file is None:
            return
        try:
            write_file(self.file, json.dumps(timings).encode())
        # a read-only file system, or another process that writes the same file at this moment
        except OSError as error:
            _log.debug("timings cannot be kept in %s: %s", self.file, error)


def _not_repeatable(path: Path, what: str) -> BundleError:
    return BundleError(
        f"{path} gives {what} other bits each time it runs: this model or this execution provider"
        " is not deterministic, and nothing it answers could be relied on"
    )
