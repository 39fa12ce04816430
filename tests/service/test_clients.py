"""The real tritonclient and kserve client, in a separate environment, against a server process."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evalmode.service.predictor import Predictor
from tests.service import processes
from tests.service.bundles import make_bundle, tensor_bundle

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
CLIENTS = Path(__file__).parent / "clients"
TEXTS = ["Ez egy rövid mondat.", "", "これは", "x" * 500]
ANSWER_S = 120


def run(program: str, *arguments: object) -> Any:
    """The JSON that a client program prints."""
    assert PYTHON.exists(), f"{PYTHON} is missing: `make test` sets it up"
    as_text = [
        argument if isinstance(argument, str) else json.dumps(argument) for argument in arguments
    ]
    process = subprocess.run(
        [str(PYTHON), str(CLIENTS / program), *as_text],
        capture_output=True,
        text=True,
        timeout=ANSWER_S,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    root = tmp_path_factory.mktemp("served")
    make_bundle(root)
    tensor_bundle(root)
    with processes.running(
        root, max_body_bytes=131_072, max_rows=256, access_log=0, poll_s=0
    ) as server:
        yield server


@pytest.fixture(scope="module")
def expected(bundle: Path) -> dict[str, list[Any]]:
    """The predictions for the texts from the same bundle, opened in this process."""
    with Predictor.open(bundle) as predictor:
        predictions = predictor.predict(TEXTS, top_k=5)
    by_label = [
        {scored.label: scored.score for scored in prediction.top} for prediction in predictions
    ]
    scores = np.array(
        [[row[label] for label in ("hu", "nl", "fi", "et", "de")] for row in by_label]
    )
    return {
        "probabilities": ["float64", [4, 5], base64.b64encode(scores.tobytes()).decode()],
        "label": [
            "object",
            [4],
            base64.b64encode(
                "|".join(prediction.label for prediction in predictions).encode()
            ).decode(),
        ],
        "truncated": [
            "bool",
            [4],
            base64.b64encode(bytes(prediction.truncated for prediction in predictions)).decode(),
        ],
    }


def triton(served: Any, program: str, options: object = None) -> Any:
    return run("triton.py", f"127.0.0.1:{served.port}", program, {} if options is None else options)


def test_triton_reads_all_metadata_of_a_server(served: Any):
    answers = triton(served, "metadata")
    assert (answers["live"], answers["ready"]) == (True, True)
    assert answers["model_ready"] == [True, True, False]
    assert answers["server"]["name"] == "evalmode"
    assert answers["model"] == answers["version"]
    assert answers["config"]["input"][0]["data_type"] == "TYPE_STRING"
    assert {entry["name"] for entry in answers["index"]} == {"tiny", "tensors"}
    assert {entry["name"] for entry in answers["statistics"]["model_stats"]} == {"tiny", "tensors"}
    assert answers["of_a_model"]["model_stats"][0]["version"] == "1"


def test_triton_gets_the_bits_of_predict_for_every_form_of_request(
    served: Any, expected: dict[str, list[Any]]
):
    answers = triton(served, "every_form", {"texts": TEXTS})
    assert len(answers) == 16
    logits = answers["default"]["logits"]
    for form, tensors in answers.items():
        assert tensors == {"logits": logits, **expected}, form


def test_triton_gets_the_best_classes_with_their_labels(
    served: Any, expected: dict[str, list[Any]]
):
    answers = triton(served, "classes", {"texts": TEXTS})
    assert answers["True"] == answers["False"]
    labels = base64.b64decode(expected["label"][2]).decode().split("|")
    assert [row[0].split(":")[2] for row in answers["True"]] == labels
    assert [len(row) for row in answers["True"]] == [2] * 4


def test_triton_sends_tensors_as_bytes_and_as_json_with_the_same_answer(served: Any):
    x = [[0.1, -2.5, 3.0], [1e-7, 4.0, 5.5]]
    ids = [[[7, 0, 0, 1, 2, 3]], [[1, 2, 3, 4, 5, 6]]]
    answers = triton(served, "tensors", {"x": x, "ids": ids})
    assert answers["y True"] == answers["y False"]
    assert answers["ids True"] == answers["ids False"]
    assert answers["y True"]["y"][:2] == ["float32", [2, 2]]


def test_triton_understands_every_refusal(served: Any):
    answers = triton(served, "refusals", {"texts": TEXTS})
    statuses = {name: status for name, (status, _) in answers.items()}
    assert statuses == {
        "model": "404",
        "version": "404",
        "datatype": "400",
        "input": "400",
        "output": "400",
        "no rows": "400",
        "too many rows": "400",
        "too long": "400",
        "body": "413",
        "metadata": "404",
        "load": "404",
        "override": "400",
        "nothing there": "404",
        "late": "400",
    }
    assert "inputs.0.shape.0 must be an integer from 1" in answers["no rows"][1]
    assert "outputs.0.name must be one of logits" in answers["output"][1]
    assert "which no request can override" in answers["override"][1]


def test_triton_unloads_and_loads_a_model(served: Any):
    answers = triton(served, "unload_and_load")
    ready, index = answers["without"]
    assert ready is False
    assert {entry["name"]: entry["state"] for entry in index}["tiny"] == "READY"
    assert {entry["name"]: entry["state"] for entry in index}.get("tensors") != "READY"
    assert answers["after"] is True


def test_with_two_workers_triton_sees_each_change_and_the_sums_on_every_connection(
    tmp_path: Path,
):
    make_bundle(tmp_path)
    tensor_bundle(tmp_path)
    with processes.running(tmp_path, workers=2, poll_s=0) as server:
        address = f"127.0.0.1:{server.port}"
        answers = triton(server, "every_worker", {"address": address, "texts": TEXTS})
    assert set(answers["unloaded"]) == {False}
    assert set(answers["states"]) == {"UNAVAILABLE"}
    assert set(answers["loaded"]) == {True}
    # 24 requests of four texts.
    assert set(answers["rows"]) == {24 * len(TEXTS)}


def test_kserve_gets_the_bits_of_predict(served: Any, expected: dict[str, list[Any]]):
    answers = run("kserve_rest.py", served.url, {"texts": TEXTS})
    assert (answers["live"], answers["ready"], answers["model_ready"]) == (
        True,
        True,
        [True, False],
    )
    assert answers["json"] == answers["binary"] == answers["binary out"]
    assert (answers["json"]["model"], answers["json"]["id"]) == ("tiny", "7")
    assert answers["json"]["label"] == expected["label"]
    assert answers["unknown"][0] == 404
    assert "there is no model 'no'" in answers["unknown"][1]
    assert answers["wrong"][0] == 400
    assert "must be BYTES for text" in answers["wrong"][1]
