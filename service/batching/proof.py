"""The online proof: some of the answered rows run again, alone, and are compared bit for bit.

The number of proofs that wait is bounded. At the bound no further answers are chosen.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evalmode.service.batching.bucket import Answer, Bucket, Row

# Proofs run while a thread is idle. Under load they wait, each with all rows of its batch. These
# bounds limit the memory that they hold.
_MAX_PENDING = 64
_MAX_PENDING_BYTES = 64 << 20


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
class PendingProof:
    """An answered row that will run again, with its batch.

    `content` holds the bytes of the answer from before the caller got it, since the caller may
    change the answer. `nbytes` is what this object holds in memory.
    """

    bucket: Bucket
    rows: Sequence[Row]
    position: int
    batch_size: int
    content: bytes
    nbytes: int


class Proofs:
    """Chooses answered rows at random and proves them. Safe to use from several threads."""

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
        self._pending: deque[PendingProof] = deque()
        self._nbytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._pending)

    def sample(
        self,
        bucket: Bucket,
        rows: Sequence[Row],
        outcomes: Sequence[Answer | Exception],
        *,
        batch_size: int,
    ) -> None:
        """Choose each answered row with the probability `fraction`, while there is room."""
        if not self._fraction:
            return
        for position, outcome in enumerate(outcomes):
            if self._draw() >= self._fraction or isinstance(outcome, Exception):
                continue
            # Checked before the content is copied, which costs time; checked again below.
            if len(self._pending) >= _MAX_PENDING:
                return
            content = self._content(outcome)
            proof = PendingProof(
                bucket=bucket,
                rows=rows,
                position=position,
                batch_size=batch_size,
                content=content,
                nbytes=len(content) + sum(row.nbytes for row in rows),
            )
            with self._lock:
                fits = (
                    len(self._pending) < _MAX_PENDING
                    and self._nbytes + proof.nbytes <= _MAX_PENDING_BYTES
                )
                # Without others any proof fits: rows beyond the byte limit must be proved too.
                if fits or not self._pending:
                    self._pending.append(proof)
                    self._nbytes += proof.nbytes

    def take(self) -> PendingProof | None:
        """Remove the oldest pending proof and return it; None if none is pending."""
        with self._lock:
            if not self._pending:
                return None
            proof = self._pending.popleft()
            self._nbytes -= proof.nbytes
            return proof

    def clear(self) -> None:
        """Drop all pending proofs."""
        with self._lock:
            self._pending.clear()
            self._nbytes = 0

    def prove(self, proof: PendingProof) -> Violation | None:
        """Run the row again alone, at the smallest allowed batch size; a violation if its answer
        differs.

        Raises whatever `run` raises: a row that cannot be run again proves nothing.
        """
        row = proof.rows[proof.position]
        outcome = proof.bucket.run([row] * proof.bucket.smallest_size)[0]
        if isinstance(outcome, Exception):
            raise outcome
        expected = self._content(outcome)
        if expected == proof.content:
            return None
        return Violation(
            bucket=proof.bucket,
            row_digest=row.description(),
            batch_digests=tuple(row.description() for row in proof.rows),
            position=proof.position,
            batch_size=proof.batch_size,
            expected_sha256=hashlib.sha256(expected).hexdigest(),
            actual_sha256=hashlib.sha256(proof.content).hexdigest(),
        )
