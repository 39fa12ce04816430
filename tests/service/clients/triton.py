"""Call a server with the unmodified tritonclient.http and print the results as JSON for a test.

It runs in the interpreter of the environment of the clients:

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
    arguments: dict[str, Any], *, binary: bool = True, column: bool = False
) -> triton.InferInput:
    texts = np.array(arguments["texts"], dtype=np.object_)
    texts = texts.reshape(-1, 1) if column else texts
    tensor = triton.InferInput("text", list(texts.shape), "BYTES")
    return tensor.set_data_from_numpy(texts, binary_data=binary)


def tensors_of(result: triton.InferResult, *names: str) -> dict[str, Any]:
    """Each tensor with its bytes, so that a test compares bits and not digits."""
    tensors = {}
    for name in names:
        array = result.as_numpy(name)
        content = (
            b"|".join(map(raw_of, array.ravel())) if array.dtype == object else array.tobytes()
        )
        tensors[name] = [str(array.dtype), list(array.shape), base64.b64encode(content).decode()]
    return tensors


def raw_of(element: str | bytes) -> bytes:
    return element.encode() if isinstance(element, str) else element


def metadata(client: triton.InferenceServerClient, arguments: dict[str, Any]) -> Any:
    """All metadata of the server and of its models."""
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


def every_form(client: triton.InferenceServerClient, arguments: dict[str, Any]) -> Any:
    """The same texts in every form of request of the client; all answers must be equal."""
    names = ("logits", "probabilities", "label", "truncated")
    results = {
        "default": tensors_of(client.infer("tiny", [texts_of(arguments)], request_id="7"), *names)
    }
    for name, options in {
        "json": {"inputs": [texts_of(arguments, binary=False)]},
        "column": {"inputs": [texts_of(arguments, column=True)]},
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
        result = client.infer("tiny", options.pop("inputs", [texts_of(arguments)]), **options)
        results[name] = tensors_of(result, *names)
    requests = [client.async_infer("tiny", [texts_of(arguments)]) for _ in range(8)]
    results.update(
        {
            f"async {index}": tensors_of(request.get_result(), *names)
            for index, request in enumerate(requests)
        }
    )
    return results


def classes(client: triton.InferenceServerClient, arguments: dict[str, Any]) -> Any:
    results = {}
    for binary in (True, False):
        output = triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=2)
        array = client.infer("tiny", [texts_of(arguments)], outputs=[output]).as_numpy(
            "probabilities"
        )
        results[str(binary)] = [[raw_of(element).decode() for element in row] for row in array]
    return results


def tensors(client: triton.InferenceServerClient, arguments: dict[str, Any]) -> Any:
    """The answers of a model of tensors, and of a model of texts that gets ids."""
    results = {}
    for binary in (True, False):
        x = np.array(arguments["x"], np.float32)
        tensor = triton.InferInput("x", list(x.shape), "FP32").set_data_from_numpy(
            x, binary_data=binary
        )
        results[f"y {binary}"] = tensors_of(client.infer("tensors", [tensor]), "y")
        ids = np.array(arguments["ids"], np.int64)
        tensor = triton.InferInput("input_ids", list(ids.shape), "INT64").set_data_from_numpy(
            ids, binary_data=binary
        )
        results[f"ids {binary}"] = tensors_of(client.infer("tiny", [tensor]), "logits", "label")
    return results


def refusals(client: triton.InferenceServerClient, arguments: dict[str, Any]) -> Any:
    """The status and the message of each refusal, as the client reports them."""
    x = np.zeros((1, 2), np.float64)
    float64 = triton.InferInput("x", [1, 2], "FP64").set_data_from_numpy(x)
    empty = triton.InferInput("text", [0], "BYTES").set_data_from_numpy(np.array([], np.object_))
    unknown = [triton.InferRequestedOutput("scores")]
    many = {"texts": ["a"] * 300}
    long = {"texts": ["x" * 70_000]}
    calls: dict[str, Callable[[], Any]] = {
        "model": lambda: client.infer("no", [texts_of(arguments)]),
        "version": lambda: client.infer("tiny", [texts_of(arguments)], model_version="9"),
        "datatype": lambda: client.infer("tensors", [float64]),
        "input": lambda: client.infer("tensors", [texts_of(arguments)]),
        "output": lambda: client.infer("tiny", [texts_of(arguments)], outputs=unknown),
        "no rows": lambda: client.infer("tiny", [empty]),
        "too many rows": lambda: client.infer("tiny", [texts_of(many)]),
        "too long": lambda: client.infer("tiny", [texts_of(long)], parameters={"truncate": False}),
        "body": lambda: client.infer("tiny", [texts_of(long), texts_of(long)]),
        "metadata": lambda: client.get_model_metadata("no"),
        "load": lambda: client.load_model("no"),
        "override": lambda: client.load_model("tiny", config="{}"),
        "nothing there": lambda: client.get_log_settings(),
        "late": lambda: client.infer(
            "tiny", [texts_of(arguments)], headers={"X-Request-Timeout-Ms": "x"}
        ),
    }
    results = {}
    for name, call in calls.items():
        try:
            call()
        except InferenceServerException as error:
            results[name] = [error.status(), error.message()]
    return results


def unload_and_load(client: triton.InferenceServerClient, arguments: dict[str, Any]) -> Any:
    """Unload a model and load it, with the state of the server after each step."""
    client.unload_model("tensors")
    without = [client.is_model_ready("tensors"), client.get_model_repository_index()]
    client.load_model("tensors")
    return {"without": without, "after": client.is_model_ready("tensors")}


def every_worker(client: triton.InferenceServerClient, arguments: dict[str, Any]) -> Any:
    """What many connections to the server see after each change, and what they count."""
    address = arguments["address"]

    def seen(call: Callable[[triton.InferenceServerClient], Any]) -> list[Any]:
        answers = []
        for _ in range(24):
            with triton.InferenceServerClient(address) as other:
                answers.append(call(other))
        return answers

    def rows_of(other: triton.InferenceServerClient) -> int:
        statistics = other.get_inference_statistics("tiny", "1")["model_stats"][0]
        return int(statistics["inference_count"])

    results: dict[str, Any] = {}
    client.unload_model("tensors")
    results["unloaded"] = seen(lambda other: other.is_model_ready("tensors"))
    states = seen(lambda other: other.get_model_repository_index())
    results["states"] = [
        {entry["name"]: entry["state"] for entry in entries}["tensors"] for entries in states
    ]
    client.load_model("tensors")
    results["loaded"] = seen(lambda other: other.is_model_ready("tensors"))
    seen(lambda other: other.infer("tiny", [texts_of(arguments)]).as_numpy("label").tolist())
    results["rows"] = seen(rows_of)
    return results


PROGRAMS = {
    "every_worker": every_worker,
    "metadata": metadata,
    "every_form": every_form,
    "classes": classes,
    "tensors": tensors,
    "refusals": refusals,
    "unload_and_load": unload_and_load,
}

if __name__ == "__main__":
    address, program, *arguments = sys.argv[1:]
    with triton.InferenceServerClient(address, concurrency=8) as client:
        print(json.dumps(PROGRAMS[program](client, json.loads(arguments[0]) if arguments else {})))
