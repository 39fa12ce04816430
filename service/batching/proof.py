"""The online proof: a sample of the answered rows, run again alone and compared bit for bit.

The number of samples is bounded; new ones are dropped while it is full.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evalmode.service.batching.bucket import Answer, Bucket, Row

_SAMPLES = 64
_SAMPLES_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Violation:
    """A row whose answer in its batch differs from its answer alone, with what is needed to run
    that batch again.

    Attributes:
        bucket: where it ran.
        row_digest: what identifies the row.
        batch_digests: the same of the batch's rows, in order, without the copies that filled it.
        place: the row's place in the batch, from 0.
        places: the row count that the batch ran with, copies of its last row included.
        expected_sha256: of the answer's content, the row alone.
        actual_sha256: of the answer's content as the caller got it.
    """

    bucket: Bucket
    row_digest: str
    batch_digests: tuple[str, ...]
    place: int
    places: int
    expected_sha256: str
    actual_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """An answered row with the batch that it was in. `content` was taken before the caller got the
    answer, and could change it.
    """

    bucket: Bucket
    rows: Sequence[Row]
    place: int
    places: int
    content: bytes
    nbytes: int


class Proofs:
    """The samples, and how one is proved. May be used from several threads at once."""

    def __init__(
        self,
        *,
        fraction: float,
        content: Callable[[Answer], bytes],
        chance: Callable[[], float] | None = None,
    ) -> None:
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(
                f"proof_fraction is {fraction}: it must be from 0 (never) to 1 (every answer)"
            )
        self._fraction = fraction
        self._content = content
        self._chance = chance or random.Random().random
        self._samples: deque[Sample] = deque()
        self._nbytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._samples)

    def sample(
        self,
        bucket: Bucket,
        rows: Sequence[Row],
        outcomes: Sequence[Answer | Exception],
        *,
        places: int,
    ) -> None:
        """Sample each answered row of a batch with the probability `fraction`, while there is
        space.
        """
        if not self._fraction:
            return
        for place, outcome in enumerate(outcomes):
            if self._chance() < self._fraction and not isinstance(outcome, Exception):
                if len(self._samples) >= _SAMPLES:
                    return
                content = self._content(outcome)
                nbytes = len(content) + sum(row.nbytes for row in rows)
                self._add(
                    Sample(
                        bucket=bucket,
                        rows=rows,
                        place=place,
                        places=places,
                        content=content,
                        nbytes=nbytes,
                    )
                )

    def take(self) -> Sample | None:
        """Remove the oldest sample and return it; None when there is none."""
        with self._lock:
            if not self._samples:
                return None
            sample = self._samples.popleft()
            self._nbytes -= sample.nbytes
            return sample

    def clear(self) -> None:
        """Drop all samples."""
        with self._lock:
            self._samples.clear()
            self._nbytes = 0

    def prove(self, sample: Sample) -> Violation | None:
        """Run the row alone, at the smallest row count that may run. A violation when its answer
        differs.

        Raises whatever `run` raises: a row that could not be run again proves nothing.
        """
        row = sample.rows[sample.place]
        outcome = sample.bucket.run([row] * sample.bucket.smallest)[0]
        if isinstance(outcome, Exception):
            raise outcome
        expected = self._content(outcome)
        if expected == sample.content:
            return None
        return Violation(
            bucket=sample.bucket,
            row_digest=row.described(),
            batch_digests=tuple(row.described() for row in sample.rows),
            place=sample.place,
            places=sample.places,
            expected_sha256=hashlib.sha256(expected).hexdigest(),
            actual_sha256=hashlib.sha256(sample.content).hexdigest(),
        )

    def _add(self, sample: Sample) -> None:
        with self._lock:
            fits = len(self._samples) < _SAMPLES and self._nbytes + sample.nbytes <= _SAMPLES_BYTES
            # The first is always taken: rows beyond the byte limit must be proved too.
            if fits or not self._samples:
                self._samples.append(sample)
                self._nbytes += sample.nbytes
