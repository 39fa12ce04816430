"""Call a server with the unmodified InferenceRESTClient of kserve and print the results as JSON.

It runs in the interpreter of the environment of the clients:

python kserve_rest.py http://HOST:PORT [ARGUMENTS AS JSON]
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from typing import Any

import httpx
import numpy as np
from kserve import InferInput, InferRequest, RESTConfig
from kserve.inference_client import InferenceRESTClient
from kserve.protocol.infer_type import RequestedOutput


def text_input(texts: list[str], *, binary: bool) -> InferInput:
    array = np.array(texts, dtype=np.object_)
    tensor = InferInput(
        name="text",
        shape=list(array.shape),
        datatype="BYTES",
        parameters=None if binary else {},
    )
    tensor.set_data_from_numpy(array, binary_data=binary)
    if binary:
        tensor.parameters = {"binary_data_size": len(tensor._raw_data)}
    return tensor


def tensor_of(response: Any, name: str) -> list[Any]:
    array = response.get_output_by_name(name).as_numpy()
    content = "|".join(array.tolist()).encode() if array.dtype == object else array.tobytes()
    return [str(array.dtype), list(array.shape), base64.b64encode(content).decode()]


async def results_of(url: str, texts: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    async with InferenceRESTClient(RESTConfig(protocol="v2", retries=1, timeout=30)) as client:
        results["live"] = await client.is_server_live(url)
        results["ready"] = await client.is_server_ready(url)
        results["model_ready"] = [await client.is_model_ready(url, name) for name in ("tiny", "no")]
        for name, binary, outputs in (
            ("json", False, None),
            ("binary", True, None),
            (
                "binary out",
                True,
                [RequestedOutput("logits", {"binary_data": True}), RequestedOutput("label", {})],
            ),
        ):
            request = InferRequest(
                model_name="tiny",
                request_id="7",
                infer_inputs=[text_input(texts, binary=binary)],
                request_outputs=outputs or [],
            )
            response = await client.infer(url, request, model_name="tiny")
            results[name] = {
                "model": response.model_name,
                "id": response.id,
                "logits": tensor_of(response, "logits"),
                "label": tensor_of(response, "label"),
            }
        for name, model, datatype in (("unknown", "no", "BYTES"), ("wrong", "tiny", "FP32")):
            tensor = InferInput(name="text", shape=[1], datatype=datatype, data=[1.0])
            try:
                await client.infer(
                    url, InferRequest(model_name=model, infer_inputs=[tensor]), model_name=model
                )
            except httpx.HTTPStatusError as error:
                results[name] = [error.response.status_code, str(error)]
    return results


if __name__ == "__main__":
    print(json.dumps(asyncio.run(results_of(sys.argv[1], json.loads(sys.argv[2])["texts"]))))
