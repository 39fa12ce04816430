"""A real server process with a real model, and real clients."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import onnxruntime
import pytest

from evalmode.service.predictor import Predictor
from tests.service import processes
from tests.service.bundles import make_bundle

WAIT_S = 30


@pytest.fixture(scope="module")
def client(service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=WAIT_S) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(bundle, texts) -> list[dict[str, object]]:
    """The predictions of `Predictor` for each text alone, as the server would write them."""
    with Predictor.open(bundle, parallel=1) as predictor:
        return [as_json(predictor.predict([text])[0]) for text in texts]


def as_json(prediction) -> dict[str, object]:
    top = [{"label": scored.label, "score": scored.score} for scored in prediction.top]
    return {
        "label": top[0]["label"],
        "score": top[0]["score"],
        "truncated": prediction.truncated,
        "top": top,
    }


def predictions(client: httpx.Client, texts: list[str]) -> list[dict[str, object]]:
    # json.dumps escapes the lone surrogate that httpx's own encoder cannot send.
    content = json.dumps({"inputs": texts})
    answer = client.post(
        "/v1/predict", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["predictions"]


def test_the_first_log_line_names_the_bundle_its_digest_and_its_known_answers(service, bundle):
    started = service.started
    assert started["bundle"] == str(bundle)
    assert started["known_answers"] == "bitwise"
    assert started["provider"] == "CPUExecutionProvider"
    assert len(started["digest"]) == 64


def test_a_server_is_ready_and_describes_its_model(service, client):
    assert client.get("/livez").json()["live"] is True
    assert client.get("/readyz").json() == {"live": True, "ready": True}
    model = client.get("/v1/model").json()
    assert (model["name"], model["version"], model["digest"]) == (
        "tiny",
        "1",
        service.started["digest"],
    )
    assert model["manifest"]["labels"] == ["hu", "nl", "fi", "et", "de"]
    assert model["certificate"]["digest"] == model["digest"]
    assert model["determinism"] == "measured here"
    assert model["known_answers"]["verdict"] == "bitwise"
    assert (model["provider"], model["threads"]) == ("CPUExecutionProvider", 1)
    assert (model["parallel"], model["workers"]) == (2, 1)
    assert set(model["row_counts"]) == {"4", "8", "16"}


def test_200_texts_alone_and_in_one_request_have_the_bits_they_have_in_process(
    client, texts, expected
):
    assert predictions(client, texts) == expected
    assert [predictions(client, [text])[0] for text in texts] == expected


def test_clients_asking_at_once_get_the_bits_of_one(client, texts, expected):
    chance = random.Random(3)
    parts = [chance.choices(range(len(texts)), k=chance.choice([1, 2, 7, 40])) for _ in range(200)]
    with ThreadPoolExecutor(16) as pool:
        answers = pool.map(
            lambda part: predictions(client, [texts[index] for index in part]), parts
        )
        for part, answer in zip(parts, answers, strict=True):
            assert answer == [expected[index] for index in part]


def test_a_client_that_closes_its_sending_side_after_the_body_is_answered(service, texts, expected):
    body = json.dumps({"inputs": texts[:3]}).encode()
    head = f"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=WAIT_S) as connection:
        connection.sendall(head.encode() + body)
        connection.shutdown(socket.SHUT_WR)
        answer = rest_of(connection)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["predictions"] == expected[:3]


def test_a_body_without_a_content_type_is_read_as_json(client):
    answer = client.post("/v1/predict", content=b'{"inputs": ["a"]}')
    assert "content-type" not in answer.request.headers
    assert answer.status_code == 200


def test_a_form_is_not_json(client):
    answer = client.post("/v1/predict", data={"inputs": "a"})
    assert answer.status_code == 400
    assert "not valid JSON" in answer.json()["error"]


TOO_MUCH = b'{"inputs": ["' + b"a" * 70_000 + b'"]}'


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "field"),
    [
        ("POST", "/v1/predict", b"{", 400, None),
        ("POST", "/v1/predict", b"", 400, None),
        ("POST", "/v1/predict", b"[]", 422, None),
        ("POST", "/v1/predict", b"{}", 422, "inputs"),
        ("POST", "/v1/predict", b'{"inputs": []}', 422, "inputs"),
        ("POST", "/v1/predict", b'{"inputs": ["", "a", "b", 4]}', 422, "inputs.3"),
        ("POST", "/v1/predict", b'{"inputs": ["a"], "top_k": 0}', 422, "top_k"),
        ("POST", "/v1/predict", b'{"inputs": ["a"], "topk": 1}', 422, "topk"),
        ("POST", "/v1/predict", json.dumps({"inputs": ["a"] * 257}).encode(), 422, "inputs"),
        (
            "POST",
            "/v1/predict",
            json.dumps({"inputs": ["a", "a" * 99], "truncate": False}).encode(),
            422,
            "inputs.1",
        ),
        ("POST", "/v1/predict", TOO_MUCH, 413, None),
        ("GET", "/v1/predict", b"", 405, None),
        ("POST", "/readyz", b"", 405, None),
        ("GET", "/nowhere", b"", 404, None),
    ],
)
def test_every_error_is_a_sentence_with_the_field_it_is_about(
    client, method, path, content, status, field
):
    answer = client.request(method, path, content=content)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error", "field"}
    assert answer.json()["field"] == field
    assert answer.json()["error"]


def test_a_body_of_another_type_is_refused(client):
    answer = client.post("/v1/predict", content=b"a", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    assert "application/json" in answer.json()["error"]


def test_a_method_that_is_not_allowed_says_which_are(client):
    assert client.get("/v1/predict").headers["allow"] == "POST"


def test_a_body_that_is_too_large_is_refused_when_it_comes_in_chunks_without_a_length(client):
    answer = client.post("/v1/predict", content=(b"x" * 4096 for _ in range(20)))
    assert answer.request.headers["transfer-encoding"] == "chunked"
    assert answer.status_code == 413
    assert client.get("/readyz").status_code == 200


def test_a_declared_length_is_refused_before_the_body_is_sent(service):
    with socket.create_connection(("127.0.0.1", service.port), timeout=WAIT_S) as connection:
        connection.sendall(
            b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: 9999999999\r\n\r\n"
        )
        answer = rest_of(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"larger than the 65536 bytes" in answer


def test_a_request_in_flight_is_answered_after_sigterm_and_the_exit_code_is_0(
    bundle, expected, texts
):
    body = json.dumps({"inputs": texts}).encode()
    with processes.running(bundle) as service:
        connections = [begin_request(service.port, len(body)) for _ in range(8)]
        service.terminate()
        wait_until_refused(service.port)
        for connection in connections:
            connection.sendall(body)
        for connection in connections:
            head, _, content = rest_of(connection).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert json.loads(content)["predictions"] == expected
        assert service.process.wait(WAIT_S) == 0
        assert "Traceback" not in service.process.stderr.read()


def test_a_client_that_hangs_up_in_the_middle_of_its_body_is_status_499_and_no_error(bundle):
    with processes.running(bundle, access_log=1) as service:
        begin_request(service.port, 100).close()
        assert (
            httpx.post(
                f"{service.url}/v1/predict", json={"inputs": ["a"]}, timeout=WAIT_S
            ).status_code
            == 200
        )
        service.terminate()
        _, logged = service.process.communicate(timeout=WAIT_S)
        assert service.process.returncode == 0
        events = [json.loads(line) for line in logged.splitlines()]
        assert [event["event"] for event in events] == ["request", "request", "draining", "stopped"]
        assert [event["status"] for event in events[:2]] == [499, 200]


def test_an_interrupt_from_the_keyboard_is_a_graceful_end(bundle):
    with processes.running(bundle) as service:
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(WAIT_S) == 0
        assert "Traceback" not in service.process.stderr.read()


# Its model takes so long to load that the signal comes first.
STOPPED_WHILE_LOADING = """
import signal, sys
from evalmode.service.process import server
from evalmode.service import components
components.open_components = lambda *arguments: signal.raise_signal(signal.SIGTERM)
sys.exit(server.main())
"""


def test_a_signal_while_the_model_is_loading_ends_with_0_and_no_output(bundle):
    ended = processes.ended(bundle, program=("-c", STOPPED_WHILE_LOADING))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_a_changed_file_is_a_refusal_to_start_that_names_it(tmp_path):
    bundle = make_bundle(tmp_path)
    model = bytearray((bundle / "model.onnx").read_bytes())
    model[len(model) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(model)
    assert str(bundle / "model.onnx") in processes.refused(bundle)


def test_a_missing_provider_is_a_refusal_to_start_that_lists_the_available_ones(bundle):
    assert "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), (
        "these tests run on a CPU build"
    )
    sentence = processes.refused(bundle, provider="cuda")
    assert "'cuda' is not available" in sentence
    assert "offers:" in sentence
    assert "cpu" in sentence


def test_a_port_in_use_is_a_refusal_to_start(bundle):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}" in processes.refused(bundle, port=port)


def test_a_host_that_does_not_exist_is_a_refusal_to_start(bundle):
    assert "cannot listen on no.such.host.invalid" in processes.refused(
        bundle, host="no.such.host.invalid"
    )


def test_a_wrong_setting_is_a_refusal_to_start(bundle):
    assert "EVALMODE_PORT" in processes.refused(bundle, port="abc")


def test_no_bundle_is_a_refusal_to_start(tmp_path):
    assert "no bundle at" in processes.refused(tmp_path)


# Serves until the signal, then prints what the process had loaded by then.
PRINTING_MODULES = """
import json, sys
from evalmode.service.process.server import main
code = main()
print(json.dumps(sorted(sys.modules)))
sys.exit(code)
"""


def test_a_process_that_serves_has_never_loaded_torch_or_onnx(bundle):
    with processes.running(bundle, program=("-c", PRINTING_MODULES)) as service:
        answer = httpx.post(f"{service.url}/v1/predict", json={"inputs": ["a"]}, timeout=WAIT_S)
        assert answer.status_code == 200
        service.terminate()
        printed, _ = service.process.communicate(timeout=WAIT_S)
        assert service.process.returncode == 0
    packages = {name.partition(".")[0] for name in json.loads(printed)}
    assert "onnxruntime" in packages
    assert packages.isdisjoint({"torch", "onnx", "lightning", "pyarrow", "onnxscript", "pandas"})


def test_a_service_is_small_and_quick_to_start(bundle):
    with processes.running(bundle) as service:
        process = f"/proc/{service.process.pid}"
        with open(f"{process}/stat") as file:
            user_ticks, system_ticks = file.read().rpartition(")")[2].split()[11:13]
        with open(f"{process}/status") as file:
            resident_kib = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    # Processor time, for this machine may be busy; on an idle one it is what passes from the start
    # until it is ready.
    assert (int(user_ticks) + int(system_ticks)) / os.sysconf("SC_CLK_TCK") < 1.5
    assert resident_kib < 250_000


def begin_request(port: int, length_bytes: int) -> socket.socket:
    """A connection whose request the application has begun to read: the server wants the body."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
    head = (
        "POST /v1/predict HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length:"
        f" {length_bytes}\r\n\r\n"
    )
    connection.sendall(head.encode())
    assert connection.recv(1024).startswith(b"HTTP/1.1 100 ")
    return connection


def rest_of(connection: socket.socket) -> bytes:
    """All bytes until the server closes the connection."""
    with connection:
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def wait_until_refused(port: int) -> None:
    """Wait until the server has begun to stop, and accepts no connection any more."""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=WAIT_S).close()
        except OSError:
            return
    raise AssertionError("the server still accepts connections")


def test_a_trailer_is_no_header_of_its_request(bundle):
    body = b'{"inputs": ["a"]}'
    request = (
        b"POST /v1/predict HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n%b\r\n"
    )
    trailers = b"x-request-id: trailer\r\ncontent-encoding: gzip\r\nx-request-timeout-ms: 0\r\n"
    with (
        processes.running(bundle) as server,
        socket.create_connection(("127.0.0.1", server.port)) as connection,
    ):
        connection.sendall(request % (len(body), body, trailers))
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"trailer" not in answer
