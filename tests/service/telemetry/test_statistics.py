"""The figures of model versions, as the statistics extension shows them."""

from __future__ import annotations

from typing import Any

from evalmode.service.batching.observer import RanBatch
from evalmode.service.telemetry.statistics import Statistics, add_records, new_record
from tests.service.batching.engine_fakes import bucket_of


def record_of(statistics: Statistics, name: str, version: str) -> dict[str, Any]:
    for record in statistics.records():
        if (record["name"], record["version"]) == (name, version):
            return record
    return new_record(name, version)


def test_a_batch_counts_its_rows_their_wait_and_its_time_by_its_size():
    statistics = Statistics(now=lambda: 12.5)
    bucket = bucket_of()
    for rows, run_s in ((2, 0.5), (2, 0.25), (1, 0.1)):
        waited_s = [0.001] * rows
        statistics.batch_ran(
            RanBatch(bucket=bucket, rows=[None] * rows, size=4, waited_s=waited_s, run_s=run_s)
        )
    figures = record_of(statistics, bucket.model, bucket.version)
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
    stats = record_of(statistics, "m", "1")["inference_stats"]
    assert stats["success"] == {"count": 1, "ns": 500_000_000}
    assert stats["fail"] == {"count": 1, "ns": 250_000_000}
    assert (stats["compute_input"]["ns"], stats["compute_output"]["ns"]) == (
        100_000_000,
        200_000_000,
    )
    assert record_of(statistics, "m", "2")["inference_stats"]["success"]["count"] == 0


def test_the_figures_that_were_unused_for_longest_are_dropped_first():
    statistics = Statistics()
    statistics.request_failed("used", "1", took_s=0)
    for version in range(2_000):
        statistics.request_failed("m", str(version), took_s=0)
        statistics.request_failed("used", "1", took_s=0)
    assert record_of(statistics, "m", "0")["inference_stats"]["fail"]["count"] == 0
    assert record_of(statistics, "m", "1999")["inference_stats"]["fail"]["count"] == 1
    assert record_of(statistics, "used", "1")["inference_stats"]["fail"]["count"] == 2_001


def test_the_records_of_several_processes_are_added_up_by_version_and_by_size_of_batch():
    first, second = Statistics(now=lambda: 1.0), Statistics(now=lambda: 2.0)
    bucket = bucket_of()
    for statistics, rows in ((first, 1), (second, 1), (second, 3)):
        waited_s = [0.5] * rows
        statistics.batch_ran(
            RanBatch(bucket=bucket, rows=[None] * rows, size=4, waited_s=waited_s, run_s=0.25)
        )
    second.request_failed("m", "2", took_s=1)
    records = add_records([*first.records(), *second.records()])
    both, other = records
    assert (both["name"], both["version"]) == (bucket.model, bucket.version)
    assert (both["last_inference"], both["inference_count"], both["execution_count"]) == (
        2_000,
        5,
        3,
    )
    assert both["inference_stats"]["queue"] == {"count": 5, "ns": 2_500_000_000}
    assert [(batch["batch_size"], batch["compute_infer"]) for batch in both["batch_stats"]] == [
        (1, {"count": 2, "ns": 500_000_000}),
        (3, {"count": 1, "ns": 250_000_000}),
    ]
    assert other == record_of(second, "m", "2")
    assert add_records([*first.records(), new_record(bucket.model, bucket.version)]) == (
        first.records()
    )


def test_sums_have_a_limit_of_versions_and_drop_the_oldest():
    records = []
    for version in range(1_001):
        record = new_record("m", str(version))
        record["last_inference"] = version
        records.append(record)
    versions = {record["version"] for record in add_records(records)}
    assert len(versions) == 1_000
    assert "0" not in versions
