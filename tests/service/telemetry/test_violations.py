from __future__ import annotations

import structlog

from evalmode.service.batching.bucket import Bucket
from evalmode.service.batching.proof import Violation
from evalmode.service.telemetry.violations import ViolationLog


def test_a_violation_is_written_down_with_all_that_it_takes_to_do_it_again():
    bucket = Bucket(
        model="m",
        version="1",
        digest="d",
        label="8",
        positions=8,
        run=list,
        costs={1: 1.0},
    )
    violation = Violation(
        bucket=bucket,
        row_digest="r2 ids[1, 8]",
        batch_digests=("r1 ids[1, 8]", "r2 ids[1, 8]"),
        place=1,
        places=4,
        expected_sha256="e",
        actual_sha256="a",
    )
    with structlog.testing.capture_logs() as logged:
        ViolationLog().proved(bucket, None)
        ViolationLog().proved(bucket, violation)
    assert logged == [
        {
            "event": "determinism violation",
            "log_level": "error",
            "model": "m",
            "version": "1",
            "digest": "d",
            "bucket": "8",
            "row": "r2 ids[1, 8]",
            "batch": ["r1 ids[1, 8]", "r2 ids[1, 8]"],
            "place": 1,
            "places": 4,
            "expected": "e",
            "actual": "a",
        }
    ]
