"""The routes of the Open Inference Protocol about the server, its models and its repository."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from evalmode.service.health import Health
from tests.service.bundles import make_bundle, tensor_bundle
from tests.service.served import Served, outputs_of, refusal, serving, text_input


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    make_bundle(root)
    tensor_bundle(root)
    with serving(root, parallel=2, max_rows=8, max_body_bytes=65_536) as server:
        yield server


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
def test_the_metadata_of_the_server_has_two_paths(served: Served, path: str):
    metadata = served.ask("GET", path).json()
    assert metadata["name"] == "evalmode"
    assert {"binary_tensor_data", "classification", "model_repository", "statistics"} <= set(
        metadata["extensions"]
    )


@pytest.mark.parametrize("path", ["/v2/models/tiny", "/v2/models/tiny/versions/1"])
def test_metadata_and_configuration_describe_the_tensors_of_a_model(served: Served, path: str):
    metadata = served.ask("GET", path).json()
    assert (metadata["name"], metadata["versions"]) == ("tiny", ["1"])
    assert metadata["platform"] == "onnx_onnxv1"
    assert metadata["inputs"] == [
        {"name": "text", "datatype": "BYTES", "shape": [-1]},
        {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1, 6]},
    ]
    assert [
        (output["name"], output["datatype"], output["shape"]) for output in metadata["outputs"]
    ] == [
        ("logits", "FP32", [-1, 5]),
        ("probabilities", "FP64", [-1, 5]),
        ("label", "BYTES", [-1]),
        ("truncated", "BOOL", [-1]),
    ]
    assert served.ask("GET", f"{path}/ready").json() == {"name": "tiny", "ready": True}
    config = served.ask("GET", f"{path}/config").json()
    assert (config["name"], config["platform"], config["max_batch_size"]) == (
        "tiny",
        "onnxruntime_onnx",
        8,
    )
    assert config["input"][1] == {
        "name": "input_ids",
        "data_type": "TYPE_INT64",
        "dims": [-1, 6],
        "optional": True,
    }
    assert config["output"][2] == {"name": "label", "data_type": "TYPE_STRING", "dims": []}


@pytest.mark.parametrize("path", ["", "/ready", "/config", "/stats"])
@pytest.mark.parametrize("model", ["nope", "tiny/versions/2", "..%2F..%2Fetc"])
def test_an_unknown_model_or_version_is_404_everywhere(served: Served, model: str, path: str):
    assert "model" in refusal(served.ask("GET", f"/v2/models/{model}{path}"), 404)


def test_health_is_that_of_the_process(served: Served):
    assert served.ask("GET", "/v2/health/live").json() == {"live": True}
    assert served.ask("GET", "/v2/health/ready").json() == {"live": True, "ready": True}
    starting = served.replace(health=Health(stuck_s=lambda: 0.0, grace_s=1))
    assert starting.ask("GET", "/v2/health/live").status_code == 200
    for path in ("/v2/health/ready", "/v2/models/tiny/ready"):
        assert refusal(starting.ask("GET", path), 503) == "the server is starting"
    stuck = served.replace(health=Health(stuck_s=lambda: 9.0, grace_s=1))
    assert "restart" in refusal(stuck.ask("GET", "/v2/health/live"), 503)


def test_the_repository_lists_loads_and_unloads(served: Served):
    (entry,) = [
        entry
        for entry in served.ask("POST", "/v2/repository/index").json()
        if entry["name"] == "tiny"
    ]
    assert entry == {"name": "tiny", "version": "1", "state": "READY", "reason": ""}
    body = json.dumps({"parameters": {"unload_dependents": False}})
    assert served.ask("POST", "/v2/repository/models/tensors/unload", content=body).json() == {}
    assert served.ask("GET", "/v2/models/tensors").status_code in (404, 503)
    index = served.ask("POST", "/v2/repository/index", content=b'{"ready": true}').json()
    assert [entry["name"] for entry in index] == ["tiny"]
    assert served.ask("POST", "/v2/repository/models/tensors/load").json() == {}
    assert served.ask("GET", "/v2/models/tensors").status_code == 200
    assert "nope" in refusal(served.ask("POST", "/v2/repository/models/nope/load"), 404)
    assert "no model can be called" in refusal(
        served.ask("POST", "/v2/repository/models/..%5C../load"), 404
    )


@pytest.mark.parametrize(
    "parameters", [{"config": "{}"}, {"file:1/model.onnx": base64.b64encode(b"x").decode()}]
)
def test_a_request_cannot_override_the_files_of_a_bundle(
    served: Served, parameters: dict[str, str]
):
    body = json.dumps({"parameters": parameters})
    answer = served.ask("POST", "/v2/repository/models/tiny/load", content=body)
    assert "which no request can override" in refusal(answer)


@pytest.mark.parametrize("verb", ["load", "unload"])
def test_with_control_off_no_request_changes_a_model(served: Served, verb: str):
    path = f"/v2/repository/models/tiny/{verb}"
    off = served.replace(settings={"model_control": False})
    assert "model_control is off" in refusal(off.ask("POST", path), 403)


@pytest.mark.parametrize(
    "body", [b"[]", b"{", b'{"parameters": 3}', b'{"parameters": {"unload_dependents": 1}}']
)
def test_a_wrong_repository_body_is_refused(served: Served, body: bytes):
    refusal(served.ask("POST", "/v2/repository/models/tiny/unload", content=body))


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        (
            "models/tiny/load",
            {"foo": 1},
            "foo is not a field of this request, which has parameters",
        ),
        (
            "models/tiny/unload",
            {"unload_dependents": True},
            "unload_dependents is not a field of this request, which has parameters",
        ),
        (
            "models/tiny/load",
            {"parameters": {}, "a b": 1},
            '"a b" is not a field of this request, which has parameters',
        ),
        ("index", {"reddy": True}, "reddy is not a field of this request, which has ready"),
        ("index", {"ready": 1}, "ready must be true or false, got 1"),
        ("index", {"ready": [True]}, "ready must be true or false, got a list"),
        (
            "models/tiny/load",
            {"parameters": {"x": 1}},
            (
                "parameters.x: a model is served as its bundle defines it, which no request can"
                " override"
            ),
        ),
        (
            "models/tiny/unload",
            {"parameters": {"unload_dependents": "no"}},
            'parameters.unload_dependents must be true or false, got "no"',
        ),
    ],
)
def test_an_unknown_field_of_a_repository_body_is_refused_and_nothing_is_changed(
    served: Served, path: str, body: dict[str, object], sentence: str
):
    answer = served.ask("POST", f"/v2/repository/{path}", content=json.dumps(body))
    assert refusal(answer) == sentence
    assert served.ask("GET", "/v2/models/tiny/ready").status_code == 200


@pytest.mark.parametrize("body", [b"", b" ", b"{}", b'{"parameters": {}}', b'{"parameters": null}'])
def test_a_repository_body_may_be_empty(served: Served, body: bytes):
    assert served.ask("POST", "/v2/repository/models/tiny/load", content=body).json() == {}


def test_statistics_count_requests_rows_and_batches(tmp_path: Path):
    make_bundle(tmp_path)
    with serving(tmp_path, parallel=1, proof_fraction=0.0) as server:
        outputs_of(server.infer({"inputs": [text_input(["a", "b", "c"])]}))
        refusal(server.infer({"inputs": [text_input(["a"], datatype="FP16")]}))
        for path in (
            "/v2/models/stats",
            "/v2/models/tiny/stats",
            "/v2/models/tiny/versions/1/stats",
        ):
            (model,) = server.ask("GET", path).json()["model_stats"]
            assert (model["name"], model["version"], model["inference_count"]) == ("tiny", "1", 3)
            stats = model["inference_stats"]
            assert (stats["success"]["count"], stats["fail"]["count"], stats["queue"]["count"]) == (
                1,
                1,
                3,
            )
            assert stats["success"]["ns"] > stats["compute_infer"]["ns"] / 3 > 0
            assert (
                sum(batch["compute_infer"]["count"] for batch in model["batch_stats"])
                == model["execution_count"]
            )
