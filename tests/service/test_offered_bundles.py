"""Bundles with a forged certificate, offered to a real server over the load route."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.service import processes
from tests.service.bundles import make_bundle, tiny_model

SERVE = ("-m", "evalmode", "serve")
WAIT_S = 60
REQUEST = {"inputs": ["Ez egy rövid mondat.", "Dit is een zin.", ""]}


def noisy_model() -> bytes:
    """The tiny model with a normal distribution added to its logits."""
    model = onnx.load_from_string(tiny_model())
    (last,) = [node for node in model.graph.node if node.output[0] == "logits"]
    last.output[0] = "quiet"
    noise = helper.make_node("RandomNormalLike", ["quiet"], ["noise"], scale=1e-3)
    model.graph.node.extend([noise, helper.make_node("Add", ["quiet", "noise"], ["logits"])])
    return model.SerializeToString()


def always_training_model() -> bytes:
    """The tiny model with a Dropout whose training mode is a constant."""
    model = onnx.load_from_string(tiny_model(dropout=0.5))
    nodes = [node for node in model.graph.node if node.output[0] not in ("largest", "on")]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "on"))
    return model.SerializeToString()


FORGED = {
    "RandomNormalLike": noisy_model,
    "Dropout": always_training_model,
    "Dropout with a computed mode": lambda: tiny_model(dropout=0.5),
}


@pytest.mark.parametrize("kind", FORGED)
def test_the_load_route_refuses_a_forged_bundle_and_the_previous_one_continues_to_serve(
    tmp_path: Path, kind: str
):
    """The hashes, the certificate and its digest are those of the forged model."""
    root = tmp_path / "bundles"
    make_bundle(root)
    forged = make_bundle(tmp_path / "made", model=FORGED[kind](), version="2")
    with (
        processes.running(root, program=SERVE, poll_s=0, parallel=1) as server,
        httpx.Client(base_url=server.url, timeout=WAIT_S) as client,
    ):
        expected = client.post("/v1/predict", json=REQUEST).content
        shutil.copytree(forged, root / "tiny" / "2")
        answer = client.post("/v2/repository/models/tiny/load")
        assert answer.status_code in (400, 409, 503), answer.text
        assert answer.json().keys() == {"error"}
        assert kind.split()[0] in answer.json()["error"]
        assert "export the module again, in eval mode" in answer.json()["error"]
        index = client.post("/v2/repository/index").json()
        states = {entry["version"]: entry["state"] for entry in index}
        assert states["1"] == "READY"
        assert states.get("2") != "READY"
        assert client.get("/v2/models/tiny/versions/2").status_code in (404, 503)
        for _ in range(20):
            assert client.post("/v1/predict", json=REQUEST).content == expected
        os.rename(root / "tiny" / "2", tmp_path / "away")
        assert client.post("/v2/repository/models/tiny/load").json() == {}


@pytest.mark.parametrize("kind", FORGED)
def test_a_server_of_a_forged_bundle_refuses_to_start(tmp_path: Path, kind: str):
    make_bundle(tmp_path, model=FORGED[kind]())
    assert kind.split()[0] in processes.refused(tmp_path)
