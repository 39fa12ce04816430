"""A module of a user, exported and served by the real commands: its tensors over /v2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from evalmode.bundle.session import open_session
from evalmode.bundle.store import open_bundle

EVALMODE = Path(sys.executable).parent / "evalmode"
EXAMPLE = Path(__file__).parents[2] / "examples" / "classifier.py"
DATATYPES = {"ids": "INT64", "mask": "FP32"}
DIRECTORY = "bundles/classifier/1"

Row = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the example, exported by the command in its docstring."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "examples").mkdir()
    shutil.copy(EXAMPLE, folder / "examples")
    command = [
        "export",
        "examples.classifier:build",
        "--inputs",
        "examples.classifier:inputs",
        "--name",
        "classifier",
    ]
    subprocess.run([EVALMODE, *command], cwd=folder, check=True, capture_output=True, timeout=300)
    return folder / DIRECTORY


@pytest.fixture(scope="module")
def server(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    command = [
        EVALMODE,
        "serve",
        exported.parents[1],
        "--port",
        "0",
        "--log-format",
        "json",
        "--access-log",
        "0",
    ]
    cache = [
        "--cache",
        tmp_path_factory.mktemp("cache"),
        "--parallel",
        "2",
        "--proof-fraction",
        "1",
    ]
    process = subprocess.Popen([*command, *cache], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = next(json.loads(line)["url"] for line in process.stderr if '"serving"' in line)
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def cases(exported: Path) -> list[tuple[Row, bytes]]:
    """Rows, each with the bits of its answer.

    They are the known answers of the bundle, and rows of lengths without a known answer.
    """
    bundle = open_bundle(exported)
    session = open_session(bundle.model)
    cases = [
        (dict(answer.inputs), answer.outputs["output_0"].tobytes())
        for answer in bundle.known_answers()
    ]
    assert len(cases) > 1
    for row, expected in cases:
        assert session.run(row)["output_0"].tobytes() == expected
    random = np.random.default_rng(0)
    for length in (5, 12, 31):
        mask = np.ones((1, length), np.float32)
        # A mask with gaps, and not only padding at the end.
        mask[0, length // 2 + 1 :: 2] = 0
        row = {"ids": random.integers(0, 100, (1, length)), "mask": mask}
        cases.append((row, session.run(row)["output_0"].tobytes()))
    return cases


def as_json(row: Row) -> dict[str, Any]:
    inputs = [
        {
            "name": name,
            "shape": [*tensor.shape],
            "datatype": DATATYPES[name],
            "data": tensor.tolist(),
        }
        for name, tensor in row.items()
    ]
    return {"json": {"inputs": inputs}}


def as_bytes(row: Row) -> dict[str, Any]:
    inputs = [
        {
            "name": name,
            "shape": [*tensor.shape],
            "datatype": DATATYPES[name],
            "parameters": {"binary_data_size": tensor.nbytes},
        }
        for name, tensor in row.items()
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    content = b"".join([head, *(tensor.tobytes() for tensor in row.values())])
    return {"content": content, "headers": {"inference-header-content-length": str(len(head))}}


def bits(answer: httpx.Response) -> bytes:
    """The bits of the only output."""
    assert answer.status_code == 200, answer.text
    length = answer.headers.get("inference-header-content-length")
    if length is not None:
        return answer.content[int(length) :]
    (output,) = answer.json()["outputs"]
    assert output["datatype"] == "FP32"
    return np.array(output["data"], np.float32).tobytes()


def output_bits(server: httpx.Client, row: Row, encoding: Any) -> bytes:
    return bits(server.post("/v2/models/classifier/infer", **encoding(row)))


@pytest.mark.parametrize("encoding", [as_json, as_bytes])
def test_every_row_has_the_bits_that_onnx_runtime_gives_it_alone(server, cases, encoding) -> None:
    assert [output_bits(server, row, encoding) for row, _ in cases] == [
        expected for _, expected in cases
    ]


@pytest.mark.parametrize("encoding", [as_json, as_bytes])
def test_every_row_has_the_same_bits_beside_other_rows_and_other_requests(
    server, cases, encoding
) -> None:
    same_shape = [
        (row, expected) for row, expected in cases if row["ids"].shape == cases[0][0]["ids"].shape
    ]
    together = {
        name: np.concatenate([row[name] for row, _ in same_shape] * 5) for name in DATATYPES
    }
    assert (
        output_bits(server, together, encoding)
        == b"".join(expected for _, expected in same_shape) * 5
    )
    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(
                lambda index: output_bits(server, cases[index % len(cases)][0], encoding),
                range(400),
            )
        )
    assert answers == [cases[index % len(cases)][1] for index in range(400)]
    figures = server.get("/metrics").text.splitlines()
    assert [
        line for line in figures if "violations_total{" in line and not line.endswith(" 0.0")
    ] == []


def test_inputs_that_the_model_refuses_are_named_in_one_sentence(server, cases) -> None:
    row = cases[0][0]
    for inputs, message in (
        ({"ids": row["ids"]}, "input 'mask' is missing"),
        ({**row, "ids": row["ids"][:, :-1]}, "the model cannot compute with these inputs"),
        ({**row, "ids": row["ids"] + 1_000}, "must be at least 0 and at most 99, got 10"),
        ({**row, "mask": row["mask"] * 0}, "output 'output_0' holds NaN in row 0"),
    ):
        answer = server.post("/v2/models/classifier/infer", **as_json(inputs))
        assert answer.json().keys() == {"error"}
        assert message in answer.json()["error"]
    assert server.post("/v1/predict", json={"inputs": ["a"]}).status_code == 422
