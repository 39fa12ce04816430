"""A real server under what production does to it, each failure by itself. Figures of latency are
bench/'s matter.
"""

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
from tests.service.bundles import SPEC, make_bundle, tiny_model
from tests.service.moody_model import ENDLESS, POISON, SLOW, SLUGGISH, moody_model

WAIT_S = 60
CHAOS = Path(__file__).parents[2] / "bench" / "chaos.py"


@pytest.fixture(scope="module")
def moody(tmp_path_factory) -> Path:
    """A bundle whose model is slow, endless or wrong for certain texts, see `moody_model`."""
    model = moody_model(tiny_model(), SPEC)
    return make_bundle(tmp_path_factory.mktemp("moody"), model=model)


def predict(service, *texts: str, **options: object) -> httpx.Response:
    return httpx.post(
        f"{service.url}/v1/predict", json={"inputs": texts}, timeout=WAIT_S, **options
    )


def until(holds: Callable[[], object], *, what: str) -> None:
    """Wait until a condition holds in another process. No event of this process tells."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if holds():
            return
        time.sleep(0.005)
    raise AssertionError(f"{what} did not happen within {WAIT_S} s")


def figure(service, name: str) -> float:
    """A figure without labels, or the sum over all labels."""
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
    """The status and the body of the one answer that comes on a connection."""
    with connection, connection.makefile("rb") as stream:
        status = int(stream.readline().split()[1])
        headers = dict(line.lower().split(b": ", 1) for line in iter(stream.readline, b"\r\n"))
        return status, json.loads(stream.read(int(headers[b"content-length"])))


def test_20_000_answers_under_chaos_have_the_bits_they_have_alone(bundle):
    """Random mixtures from up to 256 clients at once, while the model is swapped and workers are
    killed.
    """
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
            connection.sendall(request_of(f"{SLUGGISH} {number}"))
        until(
            lambda: figure(service, "evalmode_in_flight_requests") >= 200,
            what="so many requests in flight",
        )
        service.terminate()
        statuses = [answer_on(connection)[0] for connection in connections]
        assert statuses == [200] * 256
        assert service.process.wait(WAIT_S) == 0


def test_50_hot_swaps_under_load_lose_no_answer_and_change_no_bit(tmp_path, texts):
    root = make_bundle(tmp_path, version="1").parents[1]
    # Without trials, which would take most of the time of 50 swaps beside four busy clients.
    quick = processes.running(root, poll_s=0.02, load_timeout_s=0)
    with quick as service, ThreadPoolExecutor(4) as pool:
        first = predict(service, *texts[5:45]).json()
        ended = threading.Event()

        def client(_: int) -> set[str]:
            versions = set()
            with httpx.Client(base_url=service.url, timeout=WAIT_S) as opened:
                while not ended.is_set():
                    answer = opened.post("/v1/predict", json={"inputs": texts[5:45]})
                    assert answer.status_code == 200, answer.text
                    assert answer.json()["predictions"] == first["predictions"]
                    versions.add(answer.json()["model"]["version"])
            return versions

        clients = [pool.submit(client, number) for number in range(4)]
        try:
            for version in range(2, 52):
                make_bundle(tmp_path, version=str(version))
                until(
                    lambda v=str(version): version_of(service) == v,
                    what=f"the swap to version {version}",
                )
        finally:
            ended.set()
        assert len(set.union(*(client.result() for client in clients))) > 5, (
            "the clients saw the swaps"
        )
        assert figure(service, "evalmode_determinism_violations_total") == 0


def version_of(service) -> str:
    return str(httpx.get(f"{service.url}/v1/model", timeout=WAIT_S).json()["version"])


def test_a_bad_new_version_is_refused_and_the_old_one_still_serves(tmp_path):
    make_bundle(tmp_path, version="1")
    with processes.running(tmp_path, poll_s=0.02) as service:
        spoiled = make_bundle(tmp_path / "elsewhere", version="2")
        (spoiled / "model.onnx").write_bytes(b"not a model")
        spoiled.rename(tmp_path / "tiny" / "2")

        def refused() -> bool:
            index = httpx.post(f"{service.url}/v2/repository/index", timeout=WAIT_S).json()
            return any(
                entry["version"] == "2" and "model.onnx" in entry["reason"] for entry in index
            )

        until(refused, what="the refusal of version 2")
        assert version_of(service) == "1"
        assert predict(service, "a").status_code == 200


def test_a_killed_worker_loses_only_its_own_requests_and_is_replaced(moody):
    with processes.running(moody, workers=2, parallel=1) as service:
        until(lambda: len(children(service)) == 2, what="two workers")
        connections = [
            socket.create_connection(("127.0.0.1", service.port), timeout=WAIT_S) for _ in range(40)
        ]
        for number, connection in enumerate(connections):
            connection.sendall(request_of(f"{SLUGGISH} {number}"))
        until(
            lambda: figure(service, "evalmode_in_flight_requests") >= 20, what="requests in flight"
        )
        killed = children(service)[0]
        os.kill(killed, 9)
        outcomes = [outcome(connection) for connection in connections]
        assert set(outcomes) <= {200, None}
        assert outcomes.count(200) >= 1, "the other worker has answered its own"
        until(
            lambda: len(set(children(service)) - {killed}) == 2, what="another worker in its place"
        )
        assert predict(service, "a").status_code == 200


def children(service) -> list[int]:
    pid = service.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def outcome(connection: socket.socket) -> int | None:
    """The status, or None where the connection broke."""
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
        assert figure(service, "evalmode_rejections_total") == len(refused)


def test_more_rows_wait_no_longer_than_the_queue_may_take(moody):
    """The queue is bounded in seconds too, by the rate at which it has drained."""
    with (
        processes.running(moody, parallel=1, queue_s=0.01) as service,
        ThreadPoolExecutor(24) as pool,
    ):
        texts = [
            f"{SLUGGISH} {number}" if number % 2 else f"{SLUGGISH} a longer one {number}"
            for number in range(24)
        ]
        first = [
            answer.status_code for answer in pool.map(lambda text: predict(service, text), texts)
        ]
        later = [
            answer.status_code for answer in pool.map(lambda text: predict(service, text), texts)
        ]
        assert set(first) | set(later) == {200, 503}
        assert later.count(503) > 8, "by then it is known how slow they are"
        assert predict(service, *["a"] * 256).status_code == 200, (
            "nothing waits, so there is nothing to expect"
        )


def test_a_request_past_its_deadline_gets_504_and_never_runs(moody):
    with (
        processes.running(moody, parallel=1, proof_fraction=0) as service,
        ThreadPoolExecutor(8) as pool,
    ):
        busy: list[Future[httpx.Response]] = []

        def has_queue() -> bool:
            # Requests that arrive together share a batch, so more are sent until one has to wait.
            busy.append(pool.submit(predict, service, f"{SLUGGISH} {len(busy)}"))
            return figure(service, "evalmode_queue_rows") >= 1

        until(has_queue, what="a queue")
        late = predict(service, "late", headers={"x-request-timeout-ms": "1"})
        assert late.status_code == 504
        assert [answer.result().status_code for answer in busy] == [200] * len(busy)
        assert figure(service, "evalmode_dropped_rows_total") == 1
        assert figure(service, "evalmode_batch_rows_sum") == len(busy)


def test_the_rows_of_a_client_that_hung_up_leave_the_queue(moody):
    with processes.running(
        moody, parallel=1, timeout_s=2 * WAIT_S, max_run_s=2 * WAIT_S
    ) as service:
        stuck = socket.create_connection(("127.0.0.1", service.port), timeout=WAIT_S)
        stuck.sendall(request_of(ENDLESS))
        until(
            lambda: figure(service, "evalmode_running_batches") == 1,
            what="a batch that does not end",
        )
        waiting = socket.create_connection(("127.0.0.1", service.port), timeout=WAIT_S)
        waiting.sendall(request_of("a", "b", "c"))
        until(lambda: figure(service, "evalmode_queue_rows") == 3, what="three rows that wait")
        waiting.close()
        until(lambda: figure(service, "evalmode_queue_rows") == 0, what="an empty queue")
        stuck.close()


def test_an_answer_with_nan_fails_its_own_request_with_an_id_and_no_other(moody):
    with processes.running(moody, parallel=1) as service, ThreadPoolExecutor(30) as pool:
        texts = [
            f"{POISON} {number}" if number % 5 == 0 else f"{SLOW} {number}" for number in range(30)
        ]
        answers = list(pool.map(lambda text: predict(service, text), texts))
        for text, answer in zip(texts, answers, strict=True):
            if POISON in text:
                assert answer.status_code == 500
                assert "not finite" in answer.json()["error"]
                assert answer.headers["x-request-id"] in answer.json()["error"]
            else:
                assert answer.status_code == 200
        whole = predict(service, "a", POISON, "b")
        assert whole.status_code == 500, "a request is answered whole or fails whole"
        assert predict(service, "a").status_code == 200


def test_a_stuck_batch_turns_readiness_off_at_once_and_liveness_after_its_grace(moody):
    with processes.running(
        moody, parallel=2, max_run_s=0.2, stuck_grace_s=0.5, timeout_s=1
    ) as service:
        assert predict(service, ENDLESS).status_code == 504
        until(lambda: status(service, "/readyz") == 503, what="not ready")
        assert predict(service, "a").status_code == 200, "the other thread goes on"
        until(lambda: status(service, "/livez") == 503, what="not live")
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
        ), "given up by the worker, or at its deadline"
        until(lambda: len(before & set(children(service))) == 1, what="the end of the stuck worker")
        until(lambda: len(children(service)) == 2, what="another worker in its place")
        assert predict(service, "a").status_code == 200


def status(service, path: str) -> int:
    return httpx.get(f"{service.url}{path}", timeout=WAIT_S).status_code


def test_with_a_proof_fraction_of_1_every_answer_is_proven_again(bundle, texts):
    with processes.running(bundle, proof_fraction=1) as service:
        for text in texts[:30]:
            assert predict(service, text.replace("\ud83d", "")).status_code == 200
        until(
            lambda: figure(service, "evalmode_determinism_checks_total") >= 20,
            what="proofs in idle time",
        )
        assert figure(service, "evalmode_determinism_violations_total") == 0


@pytest.fixture(scope="module")
def keyed(bundle) -> Iterator[object]:
    with processes.running(bundle, api_keys="0123456789abcdef, fedcba9876543210") as service:
        yield service


@pytest.mark.parametrize("key", ["0123456789abcdef", "fedcba9876543210"])
def test_with_api_keys_each_key_is_accepted_and_nothing_else(keyed, key):
    assert predict(keyed, "a").status_code == 401
    assert (
        predict(keyed, "a", headers={"authorization": "Bearer 0123456789abcdeg"}).status_code == 401
    )
    assert predict(keyed, "a", headers={"authorization": f"Bearer {key}"}).status_code == 200
    assert predict(keyed, "a", headers={"x-api-key": key}).status_code == 200
    assert status(keyed, "/readyz") == status(keyed, "/v2/health/ready") == 200
    assert status(keyed, "/metrics") == status(keyed, "/v2/models/tiny") == 401
