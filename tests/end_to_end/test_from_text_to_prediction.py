"""The installed command from a file of texts to predictions: training, bundle, server."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

EVALMODE = Path(sys.executable).with_name("evalmode")
WORDS = {
    "animal": ["cat", "dog", "horse", "cow", "sheep", "goat", "hen", "duck"],
    "colour": ["red", "green", "blue", "black", "white", "brown", "pink", "grey"],
    "number": ["one", "two", "three", "four", "five", "six", "seven", "eight"],
}


def sentences(count: int, *, seed: int) -> list[tuple[str, str]]:
    generator = random.Random(seed)
    labels = [generator.choice(list(WORDS)) for _ in range(count)]
    return [
        (" ".join(generator.choices(WORDS[label], k=generator.randint(2, 30))), label)
        for label in labels
    ]


def run(*arguments: str, cwd: Path) -> str:
    process = subprocess.run(
        [EVALMODE, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module", params=["bpe", "ngrams"])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a small model was trained on a file and exported."""
    folder = tmp_path_factory.mktemp(request.param)
    lines = [json.dumps({"text": text, "label": label}) for text, label in sentences(600, seed=1)]
    (folder / "words.jsonl").write_text("\n".join(lines))
    small = (
        "--width",
        "16",
        "--layers",
        "1",
        "--heads",
        "2",
        "--vocabulary",
        "400",
        "--epochs",
        "3",
        "--threads",
        "1",
    )
    run("train", "--data", "words.jsonl", "--frontend", request.param, *small, cwd=folder)
    run("export", "runs/words", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def server(project: Path) -> Iterator[str]:
    """The address of a real server of the bundle."""
    command = [EVALMODE, "serve", "--port", "0"]
    settings = {**os.environ, "EVALMODE_LOG_FORMAT": "json", "EVALMODE_ACCESS_LOG": "0"}
    with subprocess.Popen(
        command, cwd=project, stderr=subprocess.PIPE, text=True, env=settings
    ) as process:
        try:
            assert process.stderr is not None
            yield next(json.loads(line)["url"] for line in process.stderr if '"serving"' in line)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()


def test_the_model_predicts_the_labels_of_its_training_data(project: Path) -> None:
    answers = json.loads(
        run("predict", "--json", "cat dog cow", "red blue", "one two six", cwd=project)
    )["predictions"]
    assert [answer["label"] for answer in answers] == ["animal", "colour", "number"]


def test_predict_and_the_server_give_the_same_bits_alone_and_in_one_request(
    project: Path, server: str
) -> None:
    texts = ["", "?!", *(text for text, _ in sentences(198, seed=2))]
    local = json.loads(run("predict", "--json", *texts, cwd=project))["predictions"]
    with httpx.Client(base_url=server) as client:
        together = client.post("/v1/predict", json={"inputs": texts}).json()["predictions"]
        alone = [
            client.post("/v1/predict", json={"inputs": [text]}).json()["predictions"][0]
            for text in texts
        ]
    assert len(local) == 200
    # Python writes and reads floats in JSON without a loss, so equal numbers have equal bits.
    assert together == local
    assert alone == local


def test_the_server_reports_the_digest_of_the_manifest_file(project: Path, server: str) -> None:
    model = httpx.get(f"{server}/v1/model").json()
    manifest = next(project.glob("bundles/*/*/manifest.json"))
    sha256 = subprocess.run(
        ["sha256sum", manifest], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    assert model["digest"] == sha256
    assert model["known_answers"]["verdict"] == "bitwise"
