"""The online proof: a sample of the answered rows, run again alone and compared bit for bit.

The number of samples that wait is bounded. While it is reached, answers are not sampled.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evalmode.service.batching.bucket import Answer, Bucket, Row

# Samples are proved while a thread is idle. Under load they wait, each with all rows of its batch:
# these bounds are what they may hold in memory.
_MAX_SAMPLES = 64
_MAX_SAMPLES_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Violation:
    """A row whose answer in its batch differs from its answer alone, with all that is needed to run
    that batch again.

    Attributes:
        bucket: where it ran.
        row_digest: the description of the row.
        batch_digests: the descriptions of the batch's rows, in order, without copies.
        position: the row's position in the batch, from 0.
        batch_size: the number of rows that the batch ran with, copies of its last row included.
        expected_sha256: of the answer's content, the row alone.
        actual_sha256: of the answer's content as the caller got it.
    """

    bucket: Bucket
    row_digest: str
    batch_digests: tuple[str, ...]
    position: int
    batch_size: int
    expected_sha256: str
    actual_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """An answered row with its batch.

    `content` holds the bytes of the answer from before the caller got it, since the caller may
    change the answer. `nbytes` is what the sample holds in memory.
    """

    bucket: Bucket
    rows: Sequence[Row]
    position: int
    batch_size: int
    content: bytes
    nbytes: int


class Proofs:
    """Draws samples of answered rows and proves them. Safe to use from several threads."""

    def __init__(
        self,
        *,
        fraction: float,
        content: Callable[[Answer], bytes],
        draw: Callable[[], float] | None = None,
    ) -> None:
        """`content` gives the bytes of an answer, `draw` a random number in [0, 1)."""
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(
                f"proof_fraction is {fraction}: it must be from 0 (never) to 1 (every answer)"
            )
        self._fraction = fraction
        self._content = content
        # A generator of its own: the global one may be seeded by other code.
        self._draw = draw or random.Random().random
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
        batch_size: int,
    ) -> None:
        """Sample each answered row with the probability `fraction`, while there is room."""
        if not self._fraction:
            return
        for position, outcome in enumerate(outcomes):
            if self._draw() >= self._fraction or isinstance(outcome, Exception):
                continue
            # Checked before the content is copied, which costs time; checked again below.
            if len(self._samples) >= _MAX_SAMPLES:
                return
            content = self._content(outcome)
            sample = Sample(
                bucket=bucket,
                rows=rows,
                position=position,
                batch_size=batch_size,
                content=content,
                nbytes=len(content) + sum(row.nbytes for row in rows),
            )
            with self._lock:
                fits = (
                    len(self._samples) < _MAX_SAMPLES
                    and self._nbytes + sample.nbytes <= _MAX_SAMPLES_BYTES
                )
                # An empty store takes any sample: rows beyond the byte limit must be proved too.
                if fits or not self._samples:
                    self._samples.append(sample)
                    self._nbytes += sample.nbytes

    def take(self) -> Sample | None:
        """Remove the oldest sample and return it; None if there is none."""
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
        """Run the row again alone, at the smallest allowed batch size; a violation if its answer
        differs.

        Raises whatever `run` raises: a row that cannot be run again proves nothing.
        """
        row = sample.rows[sample.position]
        outcome = sample.bucket.run([row] * sample.bucket.smallest_size)[0]
        if isinstance(outcome, Exception):
            raise outcome
        expected = self._content(outcome)
        if expected == sample.content:
            return None
        return Violation(
            bucket=sample.bucket,
            row_digest=row.description(),
            batch_digests=tuple(row.description() for row in sample.rows),
            position=sample.position,
            batch_size=sample.batch_size,
            expected_sha256=hashlib.sha256(expected).hexdigest(),
            actual_sha256=hashlib.sha256(sample.content).hexdigest(),
        )
