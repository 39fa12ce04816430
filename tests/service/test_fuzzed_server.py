"""A real server and bad requests: some generated from its OpenAPI schema, others mutated bodies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service import processes
from tests.service.bundles import make_bundle, tensor_bundle

FUZZ = Path(__file__).parents[2] / "bench" / "fuzz.py"
SERVED = {"model": ["tiny", "tensors"], "version": ["1"]}
KNOWN_GOOD = {"inputs": ["Ez egy rövid mondat.", "", "Dit is een zin."], "model": "tiny"}
EXAMPLES = 25  # of each operation in each phase

CONFIG = f"""
seed = 4
[generation]
deterministic = true
max-examples = {EXAMPLES}
database = "none"
[checks]
enabled = false
status_code_conformance.enabled = true
content_type_conformance.enabled = true
response_headers_conformance.enabled = true
response_schema_conformance.enabled = true
unsupported_method.enabled = true
not_a_server_error.enabled = true
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "503", "504"]
[[operations]]
include-operation-id = "v2_unload"  # without models there would be nothing to test
enabled = false
"""

# A hook, because schemathesis cannot write lines of JSON itself.
LINES = """
import schemathesis

@schemathesis.serializer("application/x-ndjson")
def lines(context, value):
    return value if isinstance(value, bytes) else str(value).encode()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a model of texts and a model of tensors."""
    folder = tmp_path_factory.mktemp("root")
    make_bundle(folder)
    tensor_bundle(folder)
    return folder


def test_every_answer_conforms_to_the_openapi_schema(root, tmp_path):
    """The requests are valid or invalid by the schema, and are sent alone and in sequences."""
    with processes.running(root) as service:
        before = answer_of(service)
        run = schemathesis(service.url, documentation_of(service), tmp_path)
        assert run.returncode == 0, run.stdout + run.stderr
        assert answer_of(service) == before
    assert int(re.findall(r"(\d+) generated", run.stdout)[0]) > 500


def schemathesis(
    url: str, openapi: dict[str, Any], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run schemathesis over these operations, in `folder`, where it leaves a cache."""
    (folder / "openapi.json").write_text(json.dumps(openapi))
    (folder / "config.toml").write_text(CONFIG)
    (folder / "lines.py").write_text(LINES)
    program = Path(sys.executable).with_name("schemathesis")
    return subprocess.run(
        [
            program,
            "--config-file",
            "config.toml",
            "run",
            "openapi.json",
            "--url",
            url,
            "--no-color",
        ],
        cwd=folder,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "lines", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def documentation_of(service) -> dict[str, Any]:
    """The OpenAPI schema of a server, with the names of its models: any other name gives a 404."""
    openapi = httpx.get(f"{service.url}/openapi.json").raise_for_status().json()
    for operation in (
        operation for path in openapi["paths"].values() for operation in path.values()
    ):
        for parameter in operation.get("parameters", ()):
            if parameter["in"] == "path":
                parameter["schema"] = {"type": "string", "enum": SERVED[parameter["name"]]}
    return openapi


def answer_of(service) -> bytes:
    return httpx.post(f"{service.url}/v1/predict", json=KNOWN_GOOD).raise_for_status().content


def test_2_000_mutated_bodies_get_intended_responses_and_do_no_harm(root):
    """The program fails if a response is a 5xx, a connection or a bit is lost, or memory grows."""
    command = [sys.executable, str(FUZZ), str(root), "--bodies", "2000", "--seed", "4"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    cells = re.findall(r"([a-z][\w ]+?) +│ ([\d,]+) ", run.stdout)
    counts = {name: int(count.replace(",", "")) for name, count in cells}
    assert counts["known good answers"] > 50
    assert counts["status 200"] > 200
    assert counts["status 400"] > 500
    assert {f"status {status}" for status in (404, 405, 408, 413, 415, 422, 431)} <= counts.keys()
