"""NaN in one output: an error for the requests of that output, and for no others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from evalmode.service.app import create_app
from tests.service.bundles import make_bundle, onnx_model, tensor_bundle, tiny_model
from tests.service.by_hand import floats
from tests.service.processes import running
from tests.service.served import Served, outputs_of, refusal, serving, text_input


def log_beside_its_argument() -> bytes:
    """same = x, log = log(x): NaN below 0."""
    return onnx_model(
        [helper.make_node("Identity", ["x"], ["same"]), helper.make_node("Log", ["x"], ["log"])],
        inputs=[floats("x", ["n", 2])],
        outputs=[floats("same", ["n", 2]), floats("log", ["n", 2])],
    )


def spoiled_text_model() -> bytes:
    """A text model whose logits are NaN, and with the number of its positions as another output."""
    model = onnx.load_from_string(tiny_model(bias=float("nan")))
    model.graph.node.append(helper.make_node("ReduceSum", ["mask", "positions"], ["count"]))
    model.graph.output.append(
        helper.make_tensor_value_info("count", TensorProto.FLOAT, ["batch", 1])
    )
    return model.SerializeToString()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    inputs = [{"x": np.ones((3, 2), np.float32)}]
    model = log_beside_its_argument()
    tensor_bundle(root, model=model, known_inputs=inputs, name="rows")
    tensor_bundle(root, model=model, known_inputs=inputs, name="unbatched", independent=False)
    make_bundle(root, model=spoiled_text_model(), name="spoiled")
    with serving(root, parallel=1, proof_fraction=0.0) as server:
        yield server


def request_of(rows: list[list[float]], *outputs: str, **parameters: Any) -> dict[str, Any]:
    raw = {"name": "x", "datatype": "FP32", "shape": [len(rows), 2], "data": rows}
    requested = [{"name": name, "parameters": parameters} for name in outputs]
    return {"inputs": [raw], **({"outputs": requested} if outputs else {})}


FINE, SPOILED = [1.0, 1.0], [1.0, -1.0]


@pytest.mark.parametrize("model", ["rows", "unbatched"])
@pytest.mark.parametrize("binary", [False, True])
def test_a_request_for_another_output_is_answered(served: Served, model: str, binary: bool):
    body = request_of([FINE, SPOILED], "same", binary_data=binary)
    answer = served.infer(body, model=model)
    assert answer.status_code == 200
    values = np.array([FINE, SPOILED], np.float32)
    if binary:
        assert answer.content.endswith(values.tobytes())
    else:
        assert outputs_of(answer)["same"]["data"] == values.ravel().tolist()


@pytest.mark.parametrize("outputs", [("log",), ("same", "log"), ()])
@pytest.mark.parametrize("binary", [False, True])
def test_a_request_for_the_output_with_nan_is_refused_with_its_name(
    served: Served, outputs: tuple[str, ...], binary: bool
):
    body = request_of([FINE, SPOILED], *outputs, binary_data=binary)
    sentence = refusal(served.infer(body, model="rows"), 500)
    assert sentence.startswith(
        "the model's output 'log' holds NaN in row 1: leave it out of outputs to get the others"
    )
    sentence = refusal(served.infer(body, model="unbatched"), 500)
    assert sentence.startswith("the model's output 'log' holds NaN: leave it out of outputs")


def test_the_classes_of_an_output_with_nan_are_refused_too(served: Served):
    body = request_of([SPOILED], "log", classification=1)
    assert "output 'log' holds NaN in row 0" in refusal(served.infer(body, model="rows"), 500)


def test_an_infinity_is_returned_in_binary_and_refused_in_json(served: Served):
    body = request_of([[1.0, 0.0]], "log", binary_data=True)
    answer = served.infer(body, model="rows")
    assert answer.status_code == 200
    assert answer.content.endswith(np.array([0, -np.inf], np.float32).tobytes())
    body = request_of([[1.0, 0.0]], "log")
    assert '"binary_data": true' in refusal(served.infer(body, model="rows"), 400)


def test_numbers_of_the_request_that_are_not_finite_are_a_mistake_of_the_client(served: Served):
    tensor = {
        "name": "x",
        "datatype": "FP32",
        "shape": [2, 2],
        "parameters": {"binary_data_size": 16},
    }
    head = httpx.Request("POST", "http://x", json={"inputs": [tensor]}).content
    raw = np.array([FINE, [np.nan, 1]], np.float32).tobytes()
    headers = {"inference-header-content-length": str(len(head))}
    sentence = refusal(served.infer(head + raw, model="rows", headers=headers), 400)
    assert (
        sentence
        == "input 'x' holds numbers that are not finite in row 1, and so does output 'same'"
    )


def test_requests_of_one_batch_fail_independently_of_each_other(served: Served):
    bodies = [
        request_of([SPOILED if number % 3 == 0 else FINE], "log" if number % 2 else "same")
        for number in range(48)
    ]

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(served.components))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await asyncio.gather(
                *(client.post("/v2/models/rows/infer", json=body) for body in bodies)
            )

    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [
        500 if number % 3 == 0 and number % 2 else 200 for number in range(48)
    ]
    alone = served.infer(bodies[1], model="rows").json()
    assert {answer.text for answer in answers[1::6]} == {answers[1].text}
    assert answers[1].json() == alone


def test_on_a_real_server_nan_affects_only_the_requests_of_its_output(
    tmp_path: Path,
):
    inputs = [{"x": np.ones((3, 2), np.float32)}]
    tensor_bundle(tmp_path, model=log_beside_its_argument(), known_inputs=inputs, name="rows")
    bodies = [request_of([SPOILED], "same"), request_of([SPOILED], "log"), request_of([FINE])]
    with (
        running(tmp_path) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        path = "/v2/models/rows/infer"
        answers = list(pool.map(lambda body: client.post(path, json=body), bodies * 20))
        assert client.get("/readyz").status_code == 200
    assert [answer.status_code for answer in answers] == [200, 500, 200] * 20
    assert {str(outputs_of(answer)["same"]["data"]) for answer in answers[::3]} == {"[1.0, -1.0]"}
    assert all("output 'log' holds NaN in row 0" in answer.text for answer in answers[1::3])
    assert {outputs_of(answer)["log"]["data"][1] for answer in answers[2::3]} == {0.0}


@pytest.mark.parametrize("outputs", [["count"], ["truncated"], ["count", "truncated"]])
def test_a_text_model_returns_the_outputs_that_are_not_computed_from_its_logits(
    served: Served, outputs: list[str]
):
    body = {"inputs": [text_input(["abc"])], "outputs": [{"name": name} for name in outputs]}
    assert list(outputs_of(served.infer(body, model="spoiled"))) == outputs


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("logits", "the model's output 'logits' holds NaN in row 0"),
        ("label", "output 'logits', the source of 'label', holds numbers that are not finite"),
        ("probabilities", "output 'logits', the source of 'probabilities', holds numbers"),
    ],
)
def test_outputs_from_logits_that_are_not_finite_are_refused(
    served: Served, output: str, sentence: str
):
    body = {"inputs": [text_input(["abc"])], "outputs": [{"name": output}]}
    assert sentence in refusal(served.infer(body, model="spoiled"), 500)


def test_a_prediction_needs_finite_logits(served: Served):
    answer = served.ask("POST", "/v1/predict", json={"inputs": ["a"], "model": "spoiled"})
    assert answer.status_code == 500
    assert (
        "output 'logits' holds numbers that are not finite for this text" in answer.json()["error"]
    )
