"""The figures of model versions, as the statistics extension shows them."""

from __future__ import annotations

from evalmode.service.batching.observer import RanBatch
from evalmode.service.telemetry.statistics import Statistics
from tests.service.batching.engine_fakes import bucket_of


def test_a_batch_counts_its_rows_their_wait_and_its_time_by_its_size():
    statistics = Statistics(now=lambda: 12.5)
    bucket = bucket_of()
    for rows, run_s in ((2, 0.5), (2, 0.25), (1, 0.1)):
        waited_s = [0.001] * rows
        statistics.batch_ran(
            RanBatch(bucket=bucket, rows=[None] * rows, size=4, waited_s=waited_s, run_s=run_s)
        )
    figures = statistics.of(bucket.model, bucket.version)
    assert (figures["last_inference"], figures["inference_count"], figures["execution_count"]) == (
        12_500,
        5,
        3,
    )
    assert figures["inference_stats"]["queue"] == {"count": 5, "ns": 5_000_000}
    assert figures["inference_stats"]["compute_infer"] == {"count": 5, "ns": 850_000_000}
    assert [(batch["batch_size"], batch["compute_infer"]) for batch in figures["batch_stats"]] == [
        (1, {"count": 1, "ns": 100_000_000}),
        (2, {"count": 2, "ns": 750_000_000}),
    ]


def test_requests_are_counted_by_how_they_ended():
    statistics = Statistics()
    statistics.request_succeeded("m", "1", took_s=0.5, read_s=0.1, write_s=0.2)
    statistics.request_failed("m", "1", took_s=0.25)
    stats = statistics.of("m", "1")["inference_stats"]
    assert stats["success"] == {"count": 1, "ns": 500_000_000}
    assert stats["fail"] == {"count": 1, "ns": 250_000_000}
    assert (stats["compute_input"]["ns"], stats["compute_output"]["ns"]) == (
        100_000_000,
        200_000_000,
    )
    assert statistics.of("m", "2")["inference_stats"]["success"]["count"] == 0


def test_the_figures_that_were_unused_for_longest_are_dropped_first():
    statistics = Statistics()
    statistics.request_failed("used", "1", took_s=0)
    for version in range(2_000):
        statistics.request_failed("m", str(version), took_s=0)
        statistics.request_failed("used", "1", took_s=0)
    assert statistics.of("m", "0")["inference_stats"]["fail"]["count"] == 0
    assert statistics.of("m", "1999")["inference_stats"]["fail"]["count"] == 1
    assert statistics.of("used", "1")["inference_stats"]["fail"]["count"] == 2_001
