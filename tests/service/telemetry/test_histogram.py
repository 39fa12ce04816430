"""Histograms: the same text as prometheus_client's own."""

from __future__ import annotations

import threading

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest

from evalmode.service.telemetry.histogram import Histogram

BOUNDS = (0, 0.05, 1, 2.5, 1024)
VALUES = (-1, 0, 0.04, 0.05, 0.050001, 1, 7, 1024, 1024.5, float("inf"))


def test_a_scrape_is_that_of_prometheus_client():
    disable_created_metrics()  # type: ignore[no-untyped-call]
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("a_seconds", "Help.", ("model", "part"), bounds=BOUNDS, registry=ours)
    expected = prometheus_client.Histogram(
        "a_seconds", "Help.", ("model", "part"), buckets=BOUNDS, registry=theirs
    )
    for part in ("x", "y"):
        for value in VALUES:
            histogram.labels("m", part).observe(value)
            expected.labels("m", part).observe(value)
    histogram.labels("without", "values")
    expected.labels("without", "values")
    assert generate_latest(ours) == generate_latest(theirs)


def test_a_histogram_without_labels_begins_at_0():
    registry = CollectorRegistry()
    Histogram("lag", "Help.", bounds=(1,), registry=registry)
    assert registry.get_sample_value("lag_count") == 0
    assert registry.get_sample_value("lag_bucket", {"le": "+Inf"}) == 0


def test_the_series_with_a_label_are_removed():
    registry = CollectorRegistry()
    histogram = Histogram("a", "Help.", ("model", "part"), bounds=(1,), registry=registry)
    for model, part in (("m", "x"), ("m", "y"), ("other", "x")):
        histogram.labels(model, part).observe(1)
    histogram.remove_by_labels({"model": "m"})
    (family,) = registry.collect()
    assert {sample.labels["model"] for sample in family.samples} == {"other"}


def test_values_of_several_threads_are_all_counted():
    registry = CollectorRegistry()
    series = Histogram("a", "Help.", bounds=(1, 2), registry=registry).labels()

    def observe() -> None:
        for _ in range(20_000):
            series.observe(2)

    threads = [threading.Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert series.figures() == ([0, 80_000, 80_000], 160_000.0)


def test_labels_that_are_missing_are_refused():
    histogram = Histogram("a", "Help.", ("model",), bounds=(1,), registry=CollectorRegistry())
    with pytest.raises(ValueError, match="has the labels"):
        histogram.labels()
