"""A real server under the failures of production, one at a time. `bench/` measures latency."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.service import processes
from tests.service.bundles import SPEC, make_bundle, tensor_bundle, tiny_model
from tests.service.by_hand import random_inputs
from tests.service.moody_model import ENDLESS, NAN_TEXT, SLOW, VERY_SLOW, moody_model

WAIT_S = 60
CHAOS = Path(__file__).parents[2] / "bench" / "chaos.py"


@pytest.fixture(scope="module")
def moody(tmp_path_factory) -> Path:
    """A bundle with the slow, endless and NaN answers of `moody_model`."""
    model = moody_model(tiny_model(), SPEC)
    return make_bundle(tmp_path_factory.mktemp("moody"), model=model)


def predict(service, *texts: str, **options: object) -> httpx.Response:
    return httpx.post(
        f"{service.url}/v1/predict", json={"inputs": texts}, timeout=WAIT_S, **options
    )


def wait_until(condition: Callable[[], object], *, event: str) -> None:
    """Poll until a condition holds in another process, which sends no event to this process."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError(f"{event} did not happen within {WAIT_S} s")


def metric(service, name: str) -> float:
    """The value of a metric, summed over all labels."""
    lines = httpx.get(f"{service.url}/metrics", timeout=WAIT_S).text.splitlines()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.partition("{")[0].partition(" ")[0] == name
    )


def request_of(*texts: str) -> bytes:
    body = json.dumps({"inputs": texts}).encode()
    return b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (
        len(body),
        body,
    )


def answer_on(connection: socket.socket) -> tuple[int, dict]:
    """The status and the body of the only response on a connection."""
    with connection, connection.makefile("rb") as stream:
        status = int(stream.readline().split()[1])
        headers = dict(line.lower().split(b": ", 1) for line in iter(stream.readline, b"\r\n"))
        return status, json.loads(stream.read(int(headers[b"content-length"])))


def test_20_000_answers_under_chaos_have_the_same_bits_as_alone(bundle):
    """Up to 256 clients send random mixtures while the model is swapped and workers are killed."""
    command = [sys.executable, str(CHAOS), str(bundle), "--answers", "20000", "--seed", "4"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "hot swaps" in run.stdout
    assert "workers killed" in run.stdout


def test_256_requests_in_flight_at_sigterm_are_all_answered(moody):
    with processes.running(moody, drain_s=0.2) as service:
        connections = [
            socket.create_connection(("127.0.0.1", service.port), timeout=WAIT_S)
            for _ in range(256)
        ]
        for number, connection in enumerate(connections):
            connection.sendall(request_of(f"{VERY_SLOW} {number}"))
        wait_until(
            lambda: metric(service, "evalmode_in_flight_requests") >= 200,
            event="200 requests in flight",
        )
        service.terminate()
        statuses = [answer_on(connection)[0] for connection in connections]
        assert statuses == [200] * 256
        assert service.process.wait(WAIT_S) == 0


def test_50_hot_swaps_under_load_lose_no_answer_and_change_no_bit(tmp_path, texts):
    root = make_bundle(tmp_path, version="1").parents[1]
    # No trials of bundles: they would take most of the time of 50 swaps beside four busy clients.
    quick = processes.running(root, poll_s=0.02, load_timeout_s=0)
    with quick as service, ThreadPoolExecutor(4) as pool:
        first = predict(service, *texts[5:45]).json()
        swapped = threading.Event()

        def client(_: int) -> set[str]:
            versions = set()
            with httpx.Client(base_url=service.url, timeout=WAIT_S) as http:
                while not swapped.is_set():
                    answer = http.post("/v1/predict", json={"inputs": texts[5:45]})
                    assert answer.status_code == 200, answer.text
                    assert answer.json()["predictions"] == first["predictions"]
                    versions.add(answer.json()["model"]["version"])
            return versions

        clients = [pool.submit(client, number) for number in range(4)]
        try:
            for version in range(2, 52):
                make_bundle(tmp_path, version=str(version))
                wait_until(
                    lambda v=str(version): version_of(service) == v,
                    event=f"the swap to version {version}",
                )
        finally:
            swapped.set()
        assert len(set.union(*(client.result() for client in clients))) > 5, (
            "the clients saw the swaps"
        )
        assert metric(service, "evalmode_determinism_violations_total") == 0


def row_of(columns: int) -> bytes:
    """The body of an inference of one row."""
    x = random_inputs(1, columns)["x"]
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, columns], "data": x.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def test_rows_of_many_shapes_have_the_same_bits_alone_and_beside_others(tmp_path):
    tensor_bundle(tmp_path)
    # 65 columns are more than the weights of the model have.
    bodies = [row_of(columns) for columns in (*range(1, 33), 65)]
    settings = {"parallel": 1, "proof_fraction": 1.0, "load_timeout_s": 0}
    with (
        processes.running(tmp_path, **settings) as service,
        httpx.Client(base_url=service.url, timeout=WAIT_S) as http,
        ThreadPoolExecutor(8) as pool,
    ):

        def infer(body: bytes) -> tuple[int, bytes]:
            answer = http.post("/v2/models/tensors/infer", content=body)
            return answer.status_code, answer.content

        # The first run of a shape is in a thread, and later ones are in the event loop.
        alone = [infer(body) for body in bodies]
        assert [status for status, _ in alone] == [200] * 32 + [400]
        futures = [pool.submit(infer, body) for _ in range(8) for body in bodies]
        probes = [http.get("/livez").status_code for _ in range(8)]
        assert [future.result() for future in futures] == alone * 8
        assert probes == [200] * 8
        assert metric(service, "evalmode_determinism_violations_total") == 0


def version_of(service) -> str:
    return str(httpx.get(f"{service.url}/v1/model", timeout=WAIT_S).json()["version"])


def test_a_bad_new_version_is_refused_and_the_old_one_continues_to_serve(tmp_path):
    make_bundle(tmp_path, version="1")
    with processes.running(tmp_path, poll_s=0.02) as service:
        damaged = make_bundle(tmp_path / "elsewhere", version="2")
        (damaged / "model.onnx").write_bytes(b"not a model")
        damaged.rename(tmp_path / "tiny" / "2")

        def refused() -> bool:
            index = httpx.post(f"{service.url}/v2/repository/index", timeout=WAIT_S).json()
            return any(
                entry["version"] == "2" and "model.onnx" in entry["reason"] for entry in index
            )

        wait_until(refused, event="the refusal of version 2")
        assert version_of(service) == "1"
        assert predict(service, "a").status_code == 200


def test_a_killed_worker_loses_only_its_own_requests_and_is_replaced(moody):
    with processes.running(moody, workers=2, parallel=1) as service:
        wait_until(lambda: len(children(service)) == 2, event="two workers")
        connections = [
            socket.create_connection(("127.0.0.1", service.port), timeout=WAIT_S) for _ in range(40)
        ]
        for number, connection in enumerate(connections):
            connection.sendall(request_of(f"{VERY_SLOW} {number}"))
        wait_until(
            lambda: metric(service, "evalmode_in_flight_requests") >= 20, event="requests in flight"
        )
        killed_pid = children(service)[0]
        os.kill(killed_pid, 9)
        outcomes = [outcome(connection) for connection in connections]
        assert set(outcomes) <= {200, None}
        assert outcomes.count(200) >= 1, "the other worker has answered its requests"
        wait_until(
            lambda: len(set(children(service)) - {killed_pid}) == 2,
            event="another worker in its place",
        )
        assert predict(service, "a").status_code == 200


def children(service) -> list[int]:
    pid = service.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def outcome(connection: socket.socket) -> int | None:
    """The status, or None if the connection broke."""
    try:
        return answer_on(connection)[0]
    except (OSError, IndexError):
        return None


def test_1_000_idle_connections_do_not_block_requests(bundle):
    with processes.running(bundle) as service:
        idle = [
            socket.create_connection(("127.0.0.1", service.port), timeout=WAIT_S)
            for _ in range(1000)
        ]
        for connection in idle[::2]:
            connection.sendall(b"POST /v1/predict HTTP/1.1\r\nhost: x\r\n")
        for _ in range(50):
            assert predict(service, "a").status_code == 200
        for connection in idle:
            connection.close()


def test_a_full_queue_refuses_at_once_and_says_when_to_retry(moody):
    with (
        processes.running(moody, parallel=1, queue_rows=4, max_rows=4) as service,
        ThreadPoolExecutor(40) as pool,
    ):
        answers = list(pool.map(lambda number: predict(service, f"{SLOW} {number}"), range(40)))
        refused = [answer for answer in answers if answer.status_code == 503]
        assert refused
        assert {answer.status_code for answer in answers} == {200, 503}
        for answer in refused:
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert "retry in" in answer.json()["error"]
        assert predict(service, "a", "b", "c", "d").status_code == 200
        assert metric(service, "evalmode_rejections_total") == len(refused)


def test_rows_that_would_exceed_the_time_limit_of_the_queue_are_refused(moody):
    """The limit in seconds is estimated from the rate at which the queue has drained."""
    with (
        # A busy machine may take long for 24 slow rows, which must not meet their deadline.
        processes.running(moody, parallel=1, queue_s=0.01, timeout_s=600) as service,
        ThreadPoolExecutor(24) as pool,
    ):
        texts = [
            f"{VERY_SLOW} {number}" if number % 2 else f"{VERY_SLOW} a longer one {number}"
            for number in range(24)
        ]
        first = [
            answer.status_code for answer in pool.map(lambda text: predict(service, text), texts)
        ]
        later = [
            answer.status_code for answer in pool.map(lambda text: predict(service, text), texts)
        ]
        assert set(first) | set(later) == {200, 503}
        assert later.count(503) > 8, "the server has measured how slow the rows are"
        assert predict(service, *["a"] * 256).status_code == 200, (
            "an empty queue accepts any number of rows"
        )


def test_a_request_past_its_deadline_gets_504_and_never_runs(moody):
    with (
        processes.running(moody, parallel=1, proof_fraction=0) as service,
        ThreadPoolExecutor(8) as pool,
    ):
        busy: list[Future[httpx.Response]] = []

        def has_queue() -> bool:
            # Requests that arrive together share a batch, so more are sent until one has to wait.
            busy.append(pool.submit(predict, service, f"{VERY_SLOW} {len(busy)}"))
            return metric(service, "evalmode_queue_rows") >= 1

        wait_until(has_queue, event="a queue")
        late = predict(service, "late", headers={"x-request-timeout-ms": "1"})
        assert late.status_code == 504
        assert [answer.result().status_code for answer in busy] == [200] * len(busy)
        assert metric(service, "evalmode_dropped_rows_total") == 1
        assert metric(service, "evalmode_batch_rows_sum") == len(busy)


def test_the_rows_of_a_client_that_hung_up_leave_the_queue(moody):
    with processes.running(
        moody, parallel=1, timeout_s=2 * WAIT_S, max_run_s=2 * WAIT_S
    ) as service:
        stuck = socket.create_connection(("127.0.0.1", service.port), timeout=WAIT_S)
        stuck.sendall(request_of(ENDLESS))
        wait_until(
            lambda: metric(service, "evalmode_running_batches") == 1,
            event="a batch that does not end",
        )
        waiting = socket.create_connection(("127.0.0.1", service.port), timeout=WAIT_S)
        waiting.sendall(request_of("a", "b", "c"))
        wait_until(
            lambda: metric(service, "evalmode_queue_rows") == 3, event="three rows that wait"
        )
        waiting.close()
        wait_until(lambda: metric(service, "evalmode_queue_rows") == 0, event="an empty queue")
        stuck.close()


def test_nan_fails_only_the_request_of_its_row_and_names_the_request_id(moody):
    with processes.running(moody, parallel=1) as service, ThreadPoolExecutor(30) as pool:
        texts = [
            f"{NAN_TEXT} {number}" if number % 5 == 0 else f"{SLOW} {number}"
            for number in range(30)
        ]
        answers = list(pool.map(lambda text: predict(service, text), texts))
        for text, answer in zip(texts, answers, strict=True):
            if NAN_TEXT in text:
                assert answer.status_code == 500
                assert "not finite" in answer.json()["error"]
                assert answer.headers["x-request-id"] in answer.json()["error"]
            else:
                assert answer.status_code == 200
        response = predict(service, "a", NAN_TEXT, "b")
        assert response.status_code == 500, "one failed row fails the whole request"
        assert predict(service, "a").status_code == 200


def test_a_stuck_batch_ends_readiness_at_once_and_liveness_after_the_grace(moody):
    with processes.running(
        moody, parallel=2, max_run_s=0.2, stuck_grace_s=0.5, timeout_s=1
    ) as service:
        assert predict(service, ENDLESS).status_code == 504
        wait_until(lambda: status(service, "/readyz") == 503, event="not ready")
        assert predict(service, "a").status_code == 200, "the other thread continues"
        wait_until(lambda: status(service, "/livez") == 503, event="not live")
        assert status(service, "/v2/health/live") == status(service, "/v2/health/ready") == 503
        service.process.kill()


def test_a_stuck_worker_with_a_supervisor_is_replaced(moody):
    with processes.running(
        moody, workers=2, parallel=1, max_run_s=0.2, stuck_grace_s=0.2, timeout_s=1
    ) as service:
        before = set(children(service))
        assert predict(service, ENDLESS).status_code in (
            503,
            504,
        ), "the worker gives up the request, or its deadline passes"
        wait_until(
            lambda: len(before & set(children(service))) == 1, event="the end of the stuck worker"
        )
        wait_until(lambda: len(children(service)) == 2, event="another worker in its place")
        assert predict(service, "a").status_code == 200


def status(service, path: str) -> int:
    return httpx.get(f"{service.url}{path}", timeout=WAIT_S).status_code


def test_with_a_proof_fraction_of_1_answers_are_checked_a_second_time(bundle, texts):
    with processes.running(bundle, proof_fraction=1) as service:
        for text in texts[:30]:
            assert predict(service, text.replace("\ud83d", "")).status_code == 200
        wait_until(
            lambda: metric(service, "evalmode_determinism_checks_total") >= 20,
            event="proofs in idle time",
        )
        assert metric(service, "evalmode_determinism_violations_total") == 0


@pytest.fixture(scope="module")
def secured(bundle) -> Iterator[object]:
    with processes.running(bundle, api_keys="0123456789abcdef, fedcba9876543210") as service:
        yield service


@pytest.mark.parametrize("key", ["0123456789abcdef", "fedcba9876543210"])
def test_with_api_keys_each_key_is_accepted_and_nothing_else(secured, key):
    assert predict(secured, "a").status_code == 401
    assert (
        predict(secured, "a", headers={"authorization": "Bearer 0123456789abcdeg"}).status_code
        == 401
    )
    assert predict(secured, "a", headers={"authorization": f"Bearer {key}"}).status_code == 200
    assert predict(secured, "a", headers={"x-api-key": key}).status_code == 200
    assert status(secured, "/readyz") == status(secured, "/v2/health/ready") == 200
    assert status(secured, "/metrics") == status(secured, "/v2/models/tiny") == 401
