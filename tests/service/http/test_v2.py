"""Inference over the Open Inference Protocol: a real model and a real engine, without a socket."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evalmode.service.batching.limits import Load
from evalmode.service.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    QueueFull,
    RequestError,
    RunFailed,
)
from tests.service.bundles import make_bundle, tensor_bundle
from tests.service.served import Served, outputs_of, refusal, serving, text_input

TEXTS = ["Ez egy rövid mondat.", "", "\ud83d", "x" * 900]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    make_bundle(root)
    tensor_bundle(root)
    with serving(root, parallel=2, max_rows=8, max_body_bytes=65_536) as server:
        yield server


def test_texts_get_the_predictions_of_v1_and_the_outputs_of_the_graph(served: Served):
    answer = served.infer({"id": "7", "model_name": "ignored", "inputs": [text_input(TEXTS)]})
    response, outputs = answer.json(), outputs_of(answer)
    model = served.components.repository.get("tiny")
    jobs, truncated = model.text_rows(TEXTS)
    answers = served.components.engine.answer(jobs)
    expected = model.predictions(answers, truncated, top_k=5)
    assert (response["model_name"], response["model_version"]) == ("tiny", "1")
    assert response["id"] == "7"
    assert response["parameters"] == {"digest": model.digest}
    assert list(outputs) == ["logits", "probabilities", "label", "truncated"]
    assert (
        outputs["logits"]["data"]
        == np.concatenate([row["logits"] for row in answers]).ravel().tolist()
    )
    assert outputs["probabilities"]["shape"] == [4, 5]
    assert outputs["label"]["data"] == [prediction.label for prediction in expected]
    assert outputs["truncated"]["data"] == [False, False, False, True]
    rows = np.reshape(outputs["probabilities"]["data"], (4, 5))
    assert rows.max(axis=1).tolist() == [prediction.score for prediction in expected]


def test_a_text_gets_the_same_bits_as_its_ids(served: Served):
    model = served.components.repository.get("tiny")
    jobs, _ = model.text_rows(TEXTS[:1])
    ids = jobs[0][1].inputs["input_ids"]
    raw = {
        "name": "input_ids",
        "datatype": "INT64",
        "shape": list(ids.shape),
        "data": ids.ravel().tolist(),
    }
    by_text, by_ids = (
        outputs_of(served.infer({"inputs": [tensor]}))
        for tensor in (text_input(TEXTS[:1], shape=[1, 1]), raw)
    )
    assert list(by_ids) == ["logits", "probabilities", "label"]
    assert all(by_text[name] == output for name, output in by_ids.items())


def test_a_model_of_tensors_has_its_own_inputs_and_outputs(served: Served):
    x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 4], "data": x.tolist()}]}
    output = outputs_of(served.infer(body, model="tensors"))["y"]
    job = served.components.repository.get("tensors").tensor_jobs({"x": x[1:]})
    alone = served.components.engine.answer(job)[0]["y"]
    assert np.array(output["data"], np.float32).reshape(2, 2)[1:].tobytes() == alone.tobytes()


def test_the_response_has_the_requested_outputs_in_their_order_and_form(served: Served):
    answer = served.infer(
        {
            "inputs": [text_input(TEXTS)],
            "parameters": {"binary_data_output": True},
            "outputs": [
                {"name": "label"},
                {
                    "name": "probabilities",
                    "parameters": {"classification": 2, "binary_data": False},
                },
            ],
        }
    )
    length = int(answer.headers["inference-header-content-length"])
    label, classes = json.loads(answer.content[:length])["outputs"]
    assert label["parameters"]["binary_data_size"] == len(answer.content) - length
    assert (classes["datatype"], classes["shape"]) == ("BYTES", [4, 2])
    value, index, name = classes["data"][0].split(":")
    assert answer.content[length:].startswith(len(name).to_bytes(4, "little") + name.encode())
    assert served.components.repository.get("tiny").labels[int(index)] == name
    assert 0 < float(value) <= 1


def test_binary_tensors_equal_json_tensors_bit_for_bit(served: Served):
    elements = b"".join(
        len(raw).to_bytes(4, "little") + raw for raw in (text.encode() for text in TEXTS[:2])
    )
    tensor = text_input(TEXTS[:2], parameters={"binary_data_size": len(elements)})
    del tensor["data"]
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    answer = served.infer(
        head + elements, headers={"inference-header-content-length": str(len(head))}
    )
    length = int(answer.headers["inference-header-content-length"])
    outputs = json.loads(answer.content[:length])["outputs"]
    position = length
    as_json = outputs_of(served.infer({"inputs": [text_input(TEXTS[:2])]}))
    for output, dtype in zip(outputs[:2], (np.float32, np.float64), strict=True):
        raw = answer.content[position : position + output["parameters"]["binary_data_size"]]
        assert raw == np.array(as_json[output["name"]]["data"], dtype).tobytes()
        position += len(raw)


def test_a_raw_body_fills_the_text(served: Served):
    answer = served.infer(TEXTS[0].encode(), headers={"inference-header-content-length": "0"})
    length = int(answer.headers["inference-header-content-length"])
    outputs = {output["name"]: output for output in json.loads(answer.content[:length])["outputs"]}
    assert outputs["logits"]["shape"] == [1, 5]


@pytest.mark.parametrize("name", ["gzip", "deflate"])
def test_bodies_may_be_compressed_both_ways_and_the_length_counts_plain_json(
    served: Served, name: str
):
    pack = {"gzip": gzip.compress, "deflate": zlib.compress}[name]
    body = {"inputs": [text_input(TEXTS)], "parameters": {"binary_data_output": True}}
    plain = served.infer(body)
    answer = served.infer(
        pack(json.dumps(body).encode()), headers={"content-encoding": name, "accept-encoding": name}
    )
    assert answer.headers["content-encoding"] == name
    assert answer.content == plain.content  # httpx has decompressed it
    header = "inference-header-content-length"
    assert answer.headers[header] == plain.headers[header]
    assert "content-encoding" not in plain.headers


def test_a_bomb_is_too_large_and_an_unknown_encoding_is_refused(served: Served):
    bomb = gzip.compress(b" " * 10**7)
    assert "larger than the 65536 bytes" in refusal(
        served.infer(bomb, headers={"content-encoding": "gzip"}), 413
    )
    unread = served.infer(b"{}", headers={"content-encoding": "br"})
    assert "content-encoding must be gzip" in refusal(unread, 415)
    assert unread.headers["accept-encoding"] == "gzip, deflate"


def test_a_long_text_is_refused_if_the_request_forbids_to_cut_it(served: Served):
    body = {"inputs": [text_input(TEXTS)], "parameters": {"truncate": False}}
    assert refusal(served.infer(body)).startswith("inputs.0.data.3 is longer than the 16 positions")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"{", "not valid JSON"),
        ({}, "inputs must hold at least 1 tensor"),
        (
            {"inputs": [text_input(["a"] * 9)]},
            "inputs.0.shape.0 must be at most 8, the rows of a request, got 9",
        ),
        ({"inputs": [text_input(["a"], shape=[1, 1, 1])]}, "inputs.0.shape must be [N] or [N, 1]"),
        ({"inputs": [text_input(["a"], shape=[])]}, "inputs.0.shape must be [N] or [N, 1]"),
        (
            {"inputs": [text_input([7], datatype="INT64")]},
            "inputs.0.datatype must be BYTES for text, got INT64",
        ),
        (
            {
                "inputs": [
                    text_input(["a"]),
                    {"name": "x", "datatype": "BOOL", "shape": [1], "data": [True]},
                ]
            },
            'inputs must be the text alone, or tensors without it, got also "x"',
        ),
        ({"inputs": [{"name": "x", "datatype": "BOOL", "shape": [1], "data": [True]}]}, "'x'"),
        (
            {"inputs": [text_input(["a"])], "outputs": [{"name": "scores"}]},
            "outputs.0.name must be one of logits, probabilities, label, truncated",
        ),
        (
            {
                "inputs": [
                    {"name": "input_ids", "datatype": "INT64", "shape": [1, 1, 6], "data": [1] * 6}
                ],
                "outputs": [{"name": "truncated"}],
            },
            "outputs.0.name must be one of logits, probabilities, label, got",
        ),
        (
            {
                "inputs": [
                    {"name": "input_ids", "datatype": "INT64", "shape": [1, 1, 6], "data": [0] * 6}
                ]
            },
            "row 0 of input_ids is empty",
        ),
        (
            {
                "inputs": [text_input(["a"])],
                "outputs": [{"name": "label", "parameters": {"classification": 1}}],
            },
            'output "label" has no classes',
        ),
    ],
)
def test_inputs_and_outputs_that_a_model_does_not_have_are_refused(
    served: Served, body: Any, sentence: str
):
    assert sentence in refusal(served.infer(body))


def test_text_that_is_not_utf_8_is_refused_with_its_index(served: Served):
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "text",
                    "datatype": "BYTES",
                    "shape": [1],
                    "parameters": {"binary_data_size": 5},
                }
            ]
        }
    ).encode()
    answer = served.infer(
        head + b"\1\0\0\0\xff", headers={"inference-header-content-length": str(len(head))}
    )
    assert refusal(answer) == "inputs.0.data.0 is not UTF-8"


@dataclass(frozen=True, kw_only=True)
class FailingEngine:
    """An engine that raises `failure`, and records the timeouts of its requests."""

    failure: Exception | None = None
    timeouts_s: list[float] = field(default_factory=list)
    load: Load = field(
        default_factory=lambda: Load(waiting_rows=0, waiting_bytes=0, running_batches=0, parallel=1)
    )

    async def answer_async(self, jobs: Any, *, timeout_s: float, timed: object) -> Any:
        self.timeouts_s.append(timeout_s)
        raise self.failure or DeadlineExceeded("too late")


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (QueueFull("full", retry_after_s=7), 503),
        (DeadlineExceeded("late"), 504),
        (RunFailed("failed"), 500),
        (BodyTooLarge("split it"), 413),
    ],
)
def test_an_error_of_the_engine_keeps_its_status(
    served: Served, failure: RequestError, status: int
):
    answer = served.replace(engine=FailingEngine(failure=failure)).infer(
        {"inputs": [text_input(["a"])]}
    )
    assert refusal(answer, status).startswith(str(failure))
    assert answer.headers.get("retry-after") == ("7" if status == 503 else None)


def test_the_shortest_of_setting_header_and_parameter_is_the_deadline(served: Served):
    engine = FailingEngine()
    other = served.replace(engine=engine)
    body = {"inputs": [text_input(["a"])]}
    for parameters, headers in (
        ({}, {}),
        ({"timeout": 0}, {"x-request-timeout-ms": "20000"}),
        ({"timeout": 10_000_000}, {"x-request-timeout-ms": "20000"}),
    ):
        refusal(other.infer({**body, "parameters": parameters}, headers=headers), 504)
    assert [round(timeout_s) for timeout_s in engine.timeouts_s] == [30, 20, 10]
    assert "x-request-timeout-ms" in refusal(
        served.infer(body, headers={"x-request-timeout-ms": "-1"})
    )


@pytest.fixture(scope="module")
def bounded() -> Iterator[Served]:
    """A recorded bundle: words below 30, and two columns below 5 and 7."""
    root = Path(__file__).parents[2] / "bundle" / "written_by" / "schema_2"
    with serving(root) as server:
        yield server


def columns_request(words: list[list[int]], columns: list[list[int]]) -> Any:
    return {
        "inputs": [
            {"name": name, "datatype": "INT64", "shape": list(np.shape(ids)), "data": ids}
            for name, ids in (("words", words), ("columns", columns))
        ]
    }


@pytest.mark.parametrize(
    ("words", "columns", "reason"),
    [
        ([[1, -1]], [[0, 0]], "words[0, 1] must be at least 0 and at most 29, got -1"),
        ([[1, 30]], [[0, 0]], "words[0, 1] must be at least 0 and at most 29, got 30"),
        ([[-30, 1]], [[0, 0]], "words[0, 0] must be at least 0 and at most 29, got -30"),
        ([[-(2**63), 1]], [[0, 0]], f"got {-(2**63)}"),
        ([[1, 2], [3, 4]], [[4, 6], [5, 6]], "columns[1, 0] must be at least 0 and at most 4"),
        ([[1, 2], [3, 4]], [[4, 6], [0, -1]], "columns[1, 1] must be at least 0 and at most 6"),
    ],
)
def test_an_id_that_the_module_refuses_is_refused_with_its_position(
    bounded: Served, words: list[list[int]], columns: list[list[int]], reason: str
) -> None:
    answer = bounded.infer(columns_request(words, columns), model="columns")
    assert answer.status_code == 400
    assert reason in answer.json()["error"]


def test_ids_at_both_ends_of_their_bounds_are_answered(bounded: Served) -> None:
    answer = bounded.infer(columns_request([[0, 29]], [[4, 6]]), model="columns")
    assert answer.status_code == 200, answer.text


def test_binary_ids_must_be_within_their_bounds_too(bounded: Served) -> None:
    request = columns_request([[1]], [[0, 0]])
    raw = {"words": np.array([[-1]], np.int64), "columns": np.array([[0, 0]], np.int64)}
    for tensor in request["inputs"]:
        del tensor["data"]
        tensor["parameters"] = {"binary_data_size": raw[tensor["name"]].nbytes}
    head = json.dumps(request).encode()
    answer = bounded.infer(
        head + b"".join(tensor.tobytes() for tensor in raw.values()),
        model="columns",
        headers={"inference-header-content-length": str(len(head))},
    )
    assert (answer.status_code, "got -1" in answer.text) == (400, True)


def test_metadata_contains_the_bounds(bounded: Served) -> None:
    words, columns = bounded.ask("GET", "/v2/models/columns").json()["inputs"]
    assert words["bounds"] == [{"minimum": 0, "maximum": 29}]
    first = {"axis": 1, "start": 0, "stop": 1}
    assert columns["bounds"][0] == {"minimum": 0, "maximum": 4, "part": [first]}
