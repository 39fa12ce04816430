"""A real server of a bundle with a tokenizer, and texts of a megabyte.

The server cuts such a text before it is tokenized, so other requests do not wait for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from onnx import TensorProto, helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from evalmode.bundle.frontend import BpeSpec
from tests.service.bundles import onnx_model, token_bundle
from tests.service.by_hand import floats
from tests.service.processes import RunningServer, running

LONG = {
    "words": "some words and more " * 50_000,
    "one word": "x" * 1_000_000,
    "combining marks": "a" + "\u0301\u0316" * 250_000,
    "line ends": "a" + "\n" * 500_000,
    "emoji": "👩‍👩‍👧" * 55_000,
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(5)
    weights = {
        "table": random.standard_normal((400, 16)).astype(np.float32),
        "head": random.standard_normal((16, 3)).astype(np.float32),
        "one": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["attention_mask"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["real", "one"], ["weights"]),
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("MatMul", ["weights", "embedded"], ["pooled"]),
        helper.make_node("MatMul", ["pooled", "head"], ["headed"]),
        helper.make_node("Squeeze", ["headed", "one"], ["logits"]),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
        for name in ("input_ids", "attention_mask")
    ]
    outputs = [floats("logits", ["batch", 3])]
    model = onnx_model(nodes, inputs=inputs, outputs=outputs, weights=weights)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["some words and more", "a word beside others"] * 5, trainer)
    return token_bundle(
        tmp_path_factory.mktemp("tokens"), model, tokenizer.to_str(), spec=BpeSpec(vocabulary=400)
    )


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[RunningServer]:
    with running(bundle) as server:
        yield server


def predict(server: RunningServer, *texts: str, **options: object) -> httpx.Response:
    body = {"inputs": texts, **options}
    return httpx.post(f"{server.url}/v1/predict", json=body, timeout=60)


@pytest.mark.parametrize("text", LONG.values(), ids=LONG.keys())
def test_the_liveness_probe_does_not_wait_for_four_texts_of_a_megabyte(server, text):
    all_answered = threading.Event()
    slowest_s = 0.0
    with ThreadPoolExecutor() as pool, httpx.Client(base_url=server.url, timeout=60) as probe:
        requests = [pool.submit(predict, server, text) for _ in range(4)]
        for request in requests:
            request.add_done_callback(
                lambda _: all(other.done() for other in requests) and all_answered.set()
            )
        while True:
            start = time.monotonic()
            probe.get("/livez").raise_for_status()
            slowest_s = max(slowest_s, time.monotonic() - start)
            if all_answered.wait(0.005):
                break
    for request in requests:
        answer = request.result()
        assert answer.status_code == 200, answer.text
        assert answer.json()["predictions"][0]["truncated"]
    # Without the cut, the probe waits for 3 to 9 s.
    assert slowest_s < 1


# A longer run of marks or line ends is another word, so the last tokens of a cut text may differ.
@pytest.mark.parametrize("name", ["words", "one word", "emoji"])
def test_a_text_of_a_megabyte_has_the_answer_of_its_beginning(server, name):
    (full,) = predict(server, LONG[name]).json()["predictions"]
    (beginning,) = predict(server, LONG[name][:2_000]).json()["predictions"]
    assert full == beginning
    assert full["truncated"]


@pytest.mark.parametrize("text", LONG.values(), ids=LONG.keys())
def test_a_text_of_a_megabyte_is_refused_if_it_must_not_be_cut(server, text):
    answer = predict(server, "short", text[:900_000], truncate=False)
    assert answer.status_code == 422
    assert answer.json()["field"] == "inputs.1"
