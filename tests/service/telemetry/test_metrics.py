"""The metrics as Prometheus reads them, of a single process and of several."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client import parser
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.openmetrics import parser as openmetrics_parser

from evalmode.service.batching.bucket import Bucket
from evalmode.service.batching.limits import Load
from evalmode.service.batching.observer import RanBatch
from evalmode.service.batching.proof import Violation
from evalmode.service.telemetry.figures import add_families, lasting_families
from evalmode.service.telemetry.histogram import Histogram
from evalmode.service.telemetry.metrics import REASONS, Metrics, render
from tests.service.processes import running

RESIDENT = "process_resident_memory_bytes"
PROCESS_FAMILIES = (
    RESIDENT,
    "process_cpu_seconds",
    "process_open_fds",
    "process_max_fds",
    "process_start_time_seconds",
)
OPENMETRICS = "application/openmetrics-text; version=1.0.0; q=0.9, */*;q=0.1"


def bucket_of(model: str = "languages", *, label: str = "32") -> Bucket:
    return Bucket(
        model=model, version="1", label=label, positions=32, run=list, costs={1: 1.0, 4: 2.0}
    )


def rows_of(*tokens: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(tokens=count, nbytes=8 * count) for count in tokens]


def one_row(bucket: Bucket) -> RanBatch:
    return RanBatch(bucket=bucket, rows=rows_of(8), size=1, waited_s=(0.0,), run_s=0.1)


def loaded_model(
    name: str = "languages", *, version: str = "1", digest: str = "d1"
) -> SimpleNamespace:
    return SimpleNamespace(name=name, version=version, digest=digest)


def values(
    metrics: Metrics, *, load: Load | None = None
) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = render(metrics.families(load=load), "")[0].decode()
    families = parser.text_string_to_metric_families(text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return values(metrics).get((f"evalmode_{name}", frozenset(labels.items())))


def series(metrics: Metrics, *, model: str) -> list[str]:
    return [name for name, labels in values(metrics) if ("model", model) in labels]


def violation() -> Violation:
    return Violation(
        bucket=bucket_of(),
        row_digest="r2",
        batch_digests=("r1", "r2", "r3"),
        position=1,
        batch_size=4,
        expected_sha256="e",
        actual_sha256="a",
    )


def test_a_request_is_counted_by_route_method_and_status_and_timed_by_route():
    metrics = Metrics()
    for _ in range(3):
        metrics.request_began()
    assert value(metrics, "in_flight_requests") == 3
    for status, reason in ((200, None), (200, None), (503, "queue_full")):
        metrics.request_ended(
            route="/v1/predict", method="POST", status=status, duration_s=0.004, reason=reason
        )
    assert value(metrics, "in_flight_requests") == 0
    assert value(metrics, "requests_total", route="/v1/predict", method="POST", status="200") == 2
    assert value(metrics, "requests_total", route="/v1/predict", method="POST", status="503") == 1
    assert value(metrics, "request_duration_seconds_bucket", route="/v1/predict", le="0.0025") == 0
    assert value(metrics, "request_duration_seconds_bucket", route="/v1/predict", le="0.005") == 3
    assert value(metrics, "request_duration_seconds_sum", route="/v1/predict") == pytest.approx(
        0.012
    )
    assert value(metrics, "rejections_total", reason="queue_full") == 1


@pytest.mark.parametrize("reason", REASONS)
def test_each_reason_has_a_series_before_the_first_rejection(reason):
    assert value(Metrics(), "rejections_total", reason=reason) == 0


def test_a_batch_gives_its_rows_tokens_padding_waits_and_run_by_model_and_bucket():
    metrics = Metrics()
    metrics.batch_ran(
        RanBatch(
            bucket=bucket_of(),
            rows=rows_of(32, 16, 16),
            size=4,
            waited_s=(0.002, 0.02, 0.0),
            run_s=0.04,
        )
    )
    labels = {"model": "languages", "bucket": "32"}
    assert value(metrics, "batch_rows_sum", **labels) == 3
    assert value(metrics, "batch_rows_count", **labels) == 1
    assert value(metrics, "batch_tokens_sum", **labels) == 64
    assert value(metrics, "batch_padding_ratio_sum", **labels) == 0.5
    assert value(metrics, "queue_wait_seconds_count", **labels) == 3
    assert value(metrics, "queue_wait_seconds_bucket", le="0.0025", **labels) == 2
    assert value(metrics, "run_duration_seconds_sum", **labels) == 0.04


def test_dropped_rows_are_counted_by_reason():
    metrics = Metrics()
    metrics.rows_dropped("deadline", bucket_of(), 3)
    metrics.rows_dropped("deadline", bucket_of(), 2)
    assert value(metrics, "dropped_rows_total", model="languages", reason="deadline") == 5


def test_all_counters_of_a_model_begin_at_0():
    metrics = Metrics()
    metrics.models_changed([loaded_model()])
    for reason in ("queue_full", "deadline", "cancelled", "failed"):
        assert value(metrics, "dropped_rows_total", model="languages", reason=reason) == 0
    for outcome in ("loaded", "unloaded", "refused"):
        assert value(metrics, "model_swaps_total", model="languages", outcome=outcome) == 0
    for name in ("determinism_checks_total", "determinism_violations_total"):
        assert value(metrics, name, model="languages") == 0


def test_swaps_of_a_model_are_reported_after_its_end():
    metrics = Metrics()
    metrics.models_changed([loaded_model()])
    metrics.models_changed([])
    metrics.model_swapped("languages", "unloaded")
    metrics.models_changed([loaded_model()])
    metrics.models_changed([])
    assert value(metrics, "model_swaps_total", model="languages", outcome="unloaded") == 1
    assert series(metrics, model="languages") == ["evalmode_model_swaps_total"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_new_server_has_all_families_and_its_counters_are_0(bundle, workers):
    with running(bundle, workers=workers) as server:
        text = httpx.get(f"{server.url}/metrics", timeout=30).text
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    assert {
        next(iter(part.collect())).name
        for part in vars(Metrics()).values()
        if isinstance(part, MetricWrapperBase | Histogram)
    } <= families.keys()
    for name in ("dropped_rows", "model_swaps", "rejections", "determinism_checks"):
        assert families[f"evalmode_{name}"].samples, name
    (dropped,) = {
        frozenset(sample.labels.items())
        for sample in families["evalmode_dropped_rows"].samples
        if sample.labels["reason"] == "deadline"
    }
    assert ("model", "tiny") in dropped
    assert all(sample.value == 0 for sample in families["evalmode_dropped_rows"].samples)


def test_the_queue_metrics_are_the_load_of_the_engine():
    load = Load(waiting_rows=7, waiting_bytes=99, running_batches=2, parallel=2)
    series = values(Metrics(), load=load)
    no_labels: frozenset[tuple[str, str]] = frozenset()
    assert series["evalmode_queue_rows", no_labels] == 7
    assert series["evalmode_queue_bytes", no_labels] == 99
    assert series["evalmode_running_batches", no_labels] == 2


def test_proofs_and_violations_are_counted():
    metrics = Metrics()
    metrics.models_changed([loaded_model()])
    assert value(metrics, "determinism_violations_total", model="languages") == 0
    metrics.proved(bucket_of(), None)
    metrics.proved(bucket_of(), violation())
    assert value(metrics, "determinism_checks_total", model="languages") == 2
    assert value(metrics, "determinism_violations_total", model="languages") == 1


def test_the_series_of_a_model_go_on_with_its_new_version():
    metrics = Metrics()
    metrics.models_changed([loaded_model()])
    metrics.batch_ran(one_row(bucket_of()))
    metrics.models_changed([loaded_model(version="2", digest="d2")])
    metrics.model_swapped("languages", "loaded")
    metrics.batch_ran(one_row(bucket_of()))
    assert value(metrics, "model_info", model="languages", version="1", digest="d1") is None
    assert value(metrics, "model_info", model="languages", version="2", digest="d2") == 1
    assert value(metrics, "batch_rows_count", model="languages", bucket="32") == 2
    assert value(metrics, "models_loaded") == 1
    assert value(metrics, "model_swaps_total", model="languages", outcome="loaded") == 1


def test_the_series_of_an_unloaded_model_end_and_its_last_batch_creates_none():
    metrics = Metrics()
    metrics.models_changed([loaded_model(), loaded_model("other")])
    for model in ("languages", "other"):
        metrics.batch_ran(one_row(bucket_of(model)))
        metrics.proved(bucket_of(model), None)
        metrics.rows_dropped("cancelled", bucket_of(model), 1)
    metrics.models_changed([loaded_model("other")])
    metrics.batch_ran(one_row(bucket_of()))
    metrics.batch_ran(one_row(bucket_of(label="64")))
    metrics.proved(bucket_of(), None)
    metrics.rows_dropped("cancelled", bucket_of(), 1)
    assert series(metrics, model="languages") == []
    assert value(metrics, "batch_rows_count", model="other", bucket="32") == 1


def test_a_model_that_is_loaded_again_is_counted_again():
    metrics = Metrics()
    for models in ([loaded_model()], [], [loaded_model()]):
        metrics.models_changed(models)
    metrics.batch_ran(one_row(bucket_of()))
    assert value(metrics, "batch_rows_count", model="languages", bucket="32") == 1


def test_models_that_are_loaded_and_unloaded_while_batches_run_leave_no_series():
    metrics = Metrics()
    is_over = threading.Event()

    def run_batches() -> None:
        while not is_over.is_set():
            metrics.batch_ran(one_row(bucket_of()))
            metrics.proved(bucket_of(), None)

    threads = [threading.Thread(target=run_batches) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(101):
        metrics.models_changed([] if turn % 2 == 0 and turn else [loaded_model()])
    is_over.set()
    for thread in threads:
        thread.join()
    assert series(metrics, model="languages") == []


def test_a_client_that_accepts_openmetrics_gets_it_and_it_is_well_formed():
    metrics = Metrics()
    metrics.models_changed([loaded_model()])
    metrics.request_began()
    metrics.request_ended(
        route="/v1/predict", method="POST", status=200, duration_s=0.1, reason=None
    )
    body, content_type = render(metrics.families(), OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")
    names = {
        family.name for family in openmetrics_parser.text_string_to_metric_families(body.decode())
    }
    assert {
        "evalmode_requests",
        "evalmode_request_duration_seconds",
        "evalmode_model_info",
    } <= names
    assert render(metrics.families(), "text/html")[1].startswith("text/plain; version=0.0.4")


def process_series(name: str, pid: int | None = None) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset([("pid", str(pid))] if pid else [])


def test_a_single_process_reports_its_resources_and_no_series_has_a_creation_time():
    metrics = Metrics()
    began_s = time.process_time()
    series = values(metrics)
    resident_bytes = resident_bytes_of(os.getpid())
    assert series[process_series(RESIDENT)] == pytest.approx(resident_bytes, rel=0.2)
    assert series[process_series("process_cpu_seconds_total")] >= began_s - 0.02
    assert series[process_series("process_start_time_seconds")] < time.time()
    assert (
        series[process_series("process_max_fds")] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    )
    files_before = series[process_series("process_open_fds")]
    with Path(os.devnull).open():
        assert values(metrics)[process_series("process_open_fds")] == files_before + 1
    assert "_created" not in render(metrics.families(), "")[0].decode()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_reports_the_resources_of_each_of_its_processes(bundle, workers):
    with running(bundle, workers=workers) as server:
        text = httpx.get(f"{server.url}/metrics", timeout=30).text
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        pids = children.read_text().split() if workers > 1 else [None]
        assert len(pids) == workers
        families = {family.name: family for family in parser.text_string_to_metric_families(text)}
        for name in PROCESS_FAMILIES:
            samples = families[name].samples
            assert {sample.labels.get("pid") for sample in samples} == set(pids), name
            assert all(sample.value > 0 for sample in samples), name
            assert len(samples) == workers
        assert families["process_cpu_seconds"].type == "counter"
        served_bytes = families[RESIDENT].samples[0].value
        pid = families[RESIDENT].samples[0].labels.get("pid") or server.process.pid
        assert served_bytes == pytest.approx(resident_bytes_of(pid), rel=0.2)
        assert "evalmode_event_loop_lag_seconds" in families
        longest = families["evalmode_event_loop_lag_max_seconds"].samples
        assert {sample.labels.get("pid") for sample in longest} == set(pids)


def test_a_dead_worker_has_no_series_and_its_replacement_has(bundle):
    with running(bundle, workers=2) as server:
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        before = set(children.read_text().split())
        killed = before.pop()
        os.kill(int(killed), signal.SIGKILL)
        deadline_s = time.monotonic() + 30
        shown_pids: set[str] = set()
        while len(shown_pids - {killed}) < 2 or killed in shown_pids:
            assert time.monotonic() < deadline_s, shown_pids
            with contextlib.suppress(httpx.TransportError):
                text = httpx.get(f"{server.url}/metrics", timeout=30).text
                shown_pids = set(re.findall(RESIDENT + r'\{pid="(\d+)"\}', text))
            time.sleep(0.05)
        assert before < shown_pids


def test_the_lag_of_the_event_loop_is_how_long_it_was_blocked():
    metrics = Metrics()

    async def blocked() -> None:
        measuring = asyncio.create_task(metrics.measure_loop_lag())
        await asyncio.sleep(0)  # the first measurement begins
        time.sleep(1.0)  # noqa: ASYNC251 - this is what is measured
        while not value(metrics, "event_loop_lag_seconds_count"):
            await asyncio.sleep(0.01)
        measuring.cancel()

    asyncio.run(asyncio.wait_for(blocked(), 30))
    assert value(metrics, "event_loop_lag_seconds_count") >= 1
    assert value(metrics, "event_loop_lag_seconds_bucket", le="0.5") == 0
    assert 0.7 <= value(metrics, "event_loop_lag_seconds_sum") < 20
    assert 0.7 <= value(metrics, "event_loop_lag_max_seconds") < 20


def resident_bytes_of(pid: object) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def process_with_figures(pid: int) -> Metrics:
    """The metrics of a process that answered one row and waits for five."""
    metrics = Metrics(pid=pid)
    metrics.models_changed([loaded_model(version="1", digest="d1")])
    metrics.models_changed([loaded_model(version="2", digest="d2")])
    metrics.batch_ran(one_row(bucket_of()))
    metrics.request_began()
    return metrics


def test_the_metrics_of_processes_add_up_and_an_ended_one_has_only_its_counts():
    load = Load(waiting_rows=5, waiting_bytes=10, running_batches=1, parallel=1)
    ended, *running_processes = (process_with_figures(pid).families(load=load) for pid in (1, 2, 3))
    before = json.dumps([ended, *running_processes])
    total = [*lasting_families(ended), *running_processes[0], *running_processes[1]]
    lines = render(add_families(total), "")[0].decode().splitlines()
    assert 'evalmode_batch_rows_count{bucket="32",model="languages"} 3.0' in lines
    assert 'evalmode_batch_rows_bucket{bucket="32",le="1.0",model="languages"} 3.0' in lines
    assert "evalmode_queue_rows 10.0" in lines
    assert "evalmode_in_flight_requests 2.0" in lines
    assert "evalmode_models_loaded 1.0" in lines
    assert [line for line in lines if line.startswith("evalmode_model_info{")] == [
        'evalmode_model_info{digest="d2",model="languages",version="2"} 1.0'
    ]
    assert 'evalmode_rejections_total{reason="queue_full"} 0.0' in lines
    for name in (RESIDENT, "process_cpu_seconds_total", "evalmode_event_loop_lag_max_seconds"):
        pids = [line for line in lines if line.startswith(f"{name}{{")]
        assert [re.findall(r'pid="(\d)"', line) for line in pids] == [["2"], ["3"]], name
    assert json.dumps([ended, *running_processes]) == before


def test_no_series_of_a_server_goes_backwards_when_a_worker_is_killed(bundle):
    with running(bundle, workers=2) as server:

        def counts() -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
            text = httpx.get(f"{server.url}/metrics", timeout=30).text
            return {
                (sample.name, frozenset(sample.labels.items())): sample.value
                for family in parser.text_string_to_metric_families(text)
                for sample in family.samples
                if family.type in ("counter", "histogram") and "pid" not in sample.labels
            }

        for _ in range(20):
            answer = httpx.post(f"{server.url}/v1/predict", json={"inputs": ["a"]}, timeout=30)
            assert answer.status_code == 200
        before = counts()
        requests = [
            count
            for (name, labels), count in before.items()
            if name == "evalmode_requests_total" and ("route", "/v1/predict") in labels
        ]
        assert requests == [20]
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        pids = children.read_text().split()
        for killed in pids:
            os.kill(int(killed), signal.SIGKILL)
        for line in server.process.stderr:
            if json.loads(line)["event"] == "a worker serves":
                break
        after = counts()
        assert {
            series: after.get(series) for series in before if after[series] < before[series]
        } == {}


def test_a_variable_for_another_server_does_not_make_this_one_count_in_files(tmp_path):
    program = (
        "import evalmode.service.telemetry.metrics, prometheus_client.values as values;"
        "print(values.ValueClass.__name__)"
    )
    process = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.strip() == "MutexValue"
    assert not list(tmp_path.iterdir())
