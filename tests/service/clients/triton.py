"""Run by the clients' own interpreter: tritonclient.http, unmodified. Prints JSON for the test to
read.

python triton.py HOST:PORT PROGRAM [ARGUMENTS AS JSON]
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException


def texts_of(
    given: dict[str, Any], *, binary: bool = True, column: bool = False
) -> triton.InferInput:
    texts = np.array(given["texts"], dtype=np.object_)
    texts = texts.reshape(-1, 1) if column else texts
    found = triton.InferInput("text", list(texts.shape), "BYTES")
    return found.set_data_from_numpy(texts, binary_data=binary)


def shown(result: triton.InferResult, *names: str) -> dict[str, Any]:
    """Each tensor with its bytes: bits are compared, not digits."""
    found = {}
    for name in names:
        array = result.as_numpy(name)
        content = (
            b"|".join(map(raw_of, array.ravel())) if array.dtype == object else array.tobytes()
        )
        found[name] = [str(array.dtype), list(array.shape), base64.b64encode(content).decode()]
    return found


def raw_of(element: str | bytes) -> bytes:
    return element.encode() if isinstance(element, str) else element


def about(client: triton.InferenceServerClient, given: dict[str, Any]) -> Any:
    """Everything that asks nothing of a model."""
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": [
            client.is_model_ready("tiny"),
            client.is_model_ready("tiny", "1"),
            client.is_model_ready("no"),
        ],
        "server": client.get_server_metadata(),
        "model": client.get_model_metadata("tiny"),
        "version": client.get_model_metadata("tiny", "1"),
        "config": client.get_model_config("tiny"),
        "statistics": client.get_inference_statistics(),
        "of_a_model": client.get_inference_statistics("tiny", "1"),
        "index": client.get_model_repository_index(),
    }


def every_way(client: triton.InferenceServerClient, given: dict[str, Any]) -> Any:
    """The same texts in each of the ways that the client knows: all must come out alike."""
    names = ("logits", "probabilities", "label", "truncated")
    found = {"default": shown(client.infer("tiny", [texts_of(given)], request_id="7"), *names)}
    for name, options in {
        "json": {"inputs": [texts_of(given, binary=False)]},
        "column": {"inputs": [texts_of(given, column=True)]},
        "json_out": {
            "outputs": [triton.InferRequestedOutput(name, binary_data=False) for name in names]
        },
        "binary_out": {
            "outputs": [triton.InferRequestedOutput(name, binary_data=True) for name in names]
        },
        "gzip": {"request_compression_algorithm": "gzip", "response_compression_algorithm": "gzip"},
        "deflate": {
            "request_compression_algorithm": "deflate",
            "response_compression_algorithm": "deflate",
        },
        "version": {"model_version": "1"},
    }.items():
        result = client.infer("tiny", options.pop("inputs", [texts_of(given)]), **options)
        found[name] = shown(result, *names)
    many = [client.async_infer("tiny", [texts_of(given)]) for _ in range(8)]
    found.update(
        {f"async {place}": shown(one.get_result(), *names) for place, one in enumerate(many)}
    )
    return found


def classes(client: triton.InferenceServerClient, given: dict[str, Any]) -> Any:
    found = {}
    for binary in (True, False):
        asked = triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=2)
        array = client.infer("tiny", [texts_of(given)], outputs=[asked]).as_numpy("probabilities")
        found[str(binary)] = [[raw_of(one).decode() for one in row] for row in array]
    return found


def tensors(client: triton.InferenceServerClient, given: dict[str, Any]) -> Any:
    """A model of tensors, and a text model by its ids."""
    found = {}
    for binary in (True, False):
        x = np.array(given["x"], np.float32)
        tensor = triton.InferInput("x", list(x.shape), "FP32").set_data_from_numpy(
            x, binary_data=binary
        )
        found[f"y {binary}"] = shown(client.infer("tensors", [tensor]), "y")
        ids = np.array(given["ids"], np.int64)
        tensor = triton.InferInput("input_ids", list(ids.shape), "INT64").set_data_from_numpy(
            ids, binary_data=binary
        )
        found[f"ids {binary}"] = shown(client.infer("tiny", [tensor]), "logits", "label")
    return found


def refused(client: triton.InferenceServerClient, given: dict[str, Any]) -> Any:
    """What the client makes of each refusal: status and sentence."""
    x = np.zeros((1, 2), np.float64)
    wrong = triton.InferInput("x", [1, 2], "FP64").set_data_from_numpy(x)
    empty = triton.InferInput("text", [0], "BYTES").set_data_from_numpy(np.array([], np.object_))
    unknown = [triton.InferRequestedOutput("scores")]
    many = {"texts": ["a"] * 300}
    long = {"texts": ["x" * 70_000]}
    calls: dict[str, Callable[[], Any]] = {
        "model": lambda: client.infer("no", [texts_of(given)]),
        "version": lambda: client.infer("tiny", [texts_of(given)], model_version="9"),
        "datatype": lambda: client.infer("tensors", [wrong]),
        "input": lambda: client.infer("tensors", [texts_of(given)]),
        "output": lambda: client.infer("tiny", [texts_of(given)], outputs=unknown),
        "no rows": lambda: client.infer("tiny", [empty]),
        "too many rows": lambda: client.infer("tiny", [texts_of(many)]),
        "too long": lambda: client.infer("tiny", [texts_of(long)], parameters={"truncate": False}),
        "body": lambda: client.infer("tiny", [texts_of(long), texts_of(long)]),
        "metadata": lambda: client.get_model_metadata("no"),
        "load": lambda: client.load_model("no"),
        "override": lambda: client.load_model("tiny", config="{}"),
        "nothing there": lambda: client.get_log_settings(),
        "late": lambda: client.infer(
            "tiny", [texts_of(given)], headers={"X-Request-Timeout-Ms": "x"}
        ),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except InferenceServerException as error:
            found[name] = [error.status(), error.message()]
    return found


def control(client: triton.InferenceServerClient, given: dict[str, Any]) -> Any:
    """Unload a model, look, and load it again."""
    client.unload_model("tensors")
    without = [client.is_model_ready("tensors"), client.get_model_repository_index()]
    client.load_model("tensors")
    return {"without": without, "after": client.is_model_ready("tensors")}


PROGRAMS = {
    found.__name__: found for found in (about, every_way, classes, tensors, refused, control)
}

if __name__ == "__main__":
    place, program, *arguments = sys.argv[1:]
    with triton.InferenceServerClient(place, concurrency=8) as client:
        print(json.dumps(PROGRAMS[program](client, json.loads(arguments[0]) if arguments else {})))
