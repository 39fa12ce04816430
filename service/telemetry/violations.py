"""What is written down when an answer came out with other bits: enough to do it again. Knows no
queue and no ONNX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from evalmode.service.batching.observer import Observer

if TYPE_CHECKING:
    from evalmode.service.batching.bucket import Bucket
    from evalmode.service.batching.proof import Violation

_log = structlog.get_logger("evalmode.service")


class ViolationLog(Observer):
    """An observer of the engine that has something to say of violations alone."""

    def proved(self, bucket: Bucket, violation: Violation | None) -> None:
        """A row had other bits in a batch than alone: which model, which rows, in which order, in
        how many places.
        """
        if violation is None:
            return
        _log.error(
            "determinism violation",
            model=bucket.model,
            version=bucket.version,
            digest=bucket.digest,
            bucket=bucket.label,
            row=violation.row_digest,
            batch=list(violation.batch_digests),
            place=violation.place,
            places=violation.places,
            expected=violation.expected_sha256,
            actual=violation.actual_sha256,
        )
