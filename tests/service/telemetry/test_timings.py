"""The times in the log line of a request, from a real server."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from evalmode.service.telemetry.timings import Timings, fields_of, is_streamed, timings_of
from tests.service.bundles import SPEC, make_bundle, tiny_model
from tests.service.moody_model import ENDLESS, moody_model
from tests.service.processes import RunningServer, running

STEPS = ("read_ms", "encode_ms", "queue_ms", "run_ms", "write_ms")
WAIT_S = 30


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[RunningServer]:
    with running(bundle, access_log=1, slow_request_s=3600) as opened:
        yield opened


def logged(server: RunningServer) -> dict[str, Any]:
    """The next line about a request."""
    assert server.process.stderr is not None
    for text in server.process.stderr:
        line: dict[str, Any] = json.loads(text)
        if line["event"] == "request":
            return line
    raise AssertionError("the server has ended")


def post(server: RunningServer, path: str, content: bytes, **headers: str) -> httpx.Response:
    return httpx.post(
        f"{server.url}{path}",
        content=content,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
        timeout=WAIT_S,
    )


V1 = ("/v1/predict", b'{"inputs": ["a", "Dit is een zin van een paar woorden."]}')
V2 = (
    "/v2/models/tiny/infer",
    json.dumps(
        {
            "inputs": [
                {
                    "name": "text",
                    "datatype": "BYTES",
                    "shape": [2],
                    "data": ["a", "Dit is een zin van een paar woorden."],
                }
            ]
        }
    ).encode(),
)


@pytest.mark.parametrize(("path", "body"), [V1, V2])
def test_a_line_says_which_model_answered_how_many_rows_and_where_the_time_went(
    server: RunningServer, path: str, body: bytes
) -> None:
    assert post(server, path, body, content_type="application/json").status_code == 200
    line = logged(server)
    assert (line["model"], line["version"], line["rows"]) == ("tiny", "1", 2)
    assert line["bucket"] == "16"  # of the longer row
    assert line["run_ms"] > 0
    assert all(line[step] >= 0 for step in STEPS)
    assert sum(line[step] for step in STEPS) <= line["duration_ms"]


def test_a_stream_has_the_sums_of_its_lines(server: RunningServer) -> None:
    lines = b'"Dit is een zin van een paar woorden."\n' * 100
    answer = post(server, "/v1/predict", lines, content_type="application/x-ndjson")
    assert answer.status_code == 200
    line = logged(server)
    assert (line["model"], line["version"], line["rows"]) == ("tiny", "1", 100)
    assert line["bucket"] == "16"
    assert all(line[step] > 0 for step in ("encode_ms", "queue_ms", "run_ms", "write_ms"))


@pytest.mark.parametrize(
    ("path", "body", "status", "fields"),
    [
        ("/v1/predict", b'{"inputs": []}', 422, set()),
        ("/v1/predict", b'{"inputs": ["a"], "model": "absent"}', 404, set()),
        ("/v2/models/absent/infer", b"{}", 404, set()),
        ("/v2/models/tiny/infer", b"{}", 400, {"model", "version", "rows", "read_ms"}),
        (
            "/v1/predict",
            b'{"inputs": ["a", "' + b"long " * 99 + b'"], "truncate": false}',
            422,
            {"model", "version", "rows", "read_ms"},
        ),
    ],
)
def test_a_refused_request_has_the_steps_that_it_reached(
    server: RunningServer, path: str, body: bytes, status: int, fields: set[str]
) -> None:
    assert post(server, path, body, content_type="application/json").status_code == status
    line = logged(server)
    assert fields == line.keys() & {"model", "version", "rows", "bucket", *STEPS}


def test_other_requests_have_no_model(server: RunningServer) -> None:
    httpx.get(f"{server.url}/v1/model", timeout=WAIT_S)
    line = logged(server)
    assert line["route"] == "/v1/model"
    assert "model" not in line


def test_slow_requests_are_logged_although_the_log_is_a_sample_but_slow_streams_are_not(
    bundle: Path,
) -> None:
    with running(bundle, access_log=0, slow_request_s=0.0001) as server:
        post(server, "/v1/predict", b'"a"\n', content_type="application/x-ndjson")
        post(server, *V1, content_type="application/json")
        line = logged(server)
        assert (line["route"], line["level"]) == ("/v1/predict", "info")
        assert line["rows"] == 2  # of the second request: the stream has no line


def test_the_line_of_a_request_without_an_answer_says_how_long_it_waited(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    slow = make_bundle(tmp_path_factory.mktemp("moody"), model=moody_model(tiny_model(), SPEC))
    endless = json.dumps({"inputs": [ENDLESS]}).encode()
    with running(slow, access_log=1, parallel=1, slow_request_s=3600) as server:
        address = ("127.0.0.1", server.port)
        with socket.create_connection(address) as endless_request:
            endless_request.sendall(
                b"POST /v1/predict HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%s" % (len(endless), endless)
            )
            wait_for_run(server)
            late = post(server, *V1, content_type="application/json", x_request_timeout_ms="1000")
            assert late.status_code == 504
            line = logged(server)
            assert (line["status"], line["run_ms"]) == (504, 0)
            assert line["queue_ms"] > 100
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    f"{server.url}/v1/predict",
                    content=V1[1],
                    headers={"content-type": "application/json"},
                    timeout=1,
                )
            line = logged(server)
            assert (line["status"], line["run_ms"]) == (499, 0)
            assert line["queue_ms"] > 100


def wait_for_run(server: RunningServer) -> None:
    """Return when a batch runs."""
    deadline_s = time.monotonic() + WAIT_S
    while "evalmode_running_batches 1.0" not in httpx.get(f"{server.url}/metrics").text:
        assert time.monotonic() < deadline_s


def test_timings_are_created_at_their_first_use_and_empty_without_a_model() -> None:
    scope: dict[str, Any] = {}
    assert fields_of(scope) == {}
    assert not is_streamed(scope)
    timings = timings_of(scope)
    assert timings_of(scope) is timings
    timings.read_s = 0.5
    assert fields_of(scope) == {}


def test_repeated_steps_add_up_and_the_longest_bucket_stays() -> None:
    timings = Timings()
    timings.model, timings.version = "m", "2"
    for positions in (8, 32, 16):
        jobs = [(SimpleNamespace(label=str(positions), positions=positions), None)] * 2
        timings.encoded(jobs, since=0.0)  # type: ignore[arg-type]
        timings.waited(0.001, 0.002)
    fields = timings.fields()
    assert fields["rows"] == 6
    assert fields["bucket"] == "32"
    assert (fields["queue_ms"], fields["run_ms"]) == (3.0, 6.0)
    assert "write_ms" not in fields
