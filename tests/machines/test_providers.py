"""Exact bundles on other execution providers, each in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.machines.environments import PROVIDERS, ROOT, ProviderEnvironment

pytestmark = pytest.mark.machines

SCRIPT = ROOT / "tests" / "machines" / "run_on_provider.py"
ROWS = 96
# Other orders of float32 additions change these logits by 1e-6, and bfloat16 by 1e-2.
FLOAT32_NOISE = 1e-4


@pytest.fixture(params=PROVIDERS, ids=lambda environment: environment.name)
def environment(request: pytest.FixtureRequest) -> ProviderEnvironment:
    chosen: ProviderEnvironment = request.param
    chosen.require()
    return chosen


def run(environment: ProviderEnvironment, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(environment.python), *map(str, arguments)],
        env={**os.environ, **environment.variables},
        capture_output=True,
        text=True,
        check=False,
    )


def compare(environment: ProviderEnvironment, bundle: Path) -> tuple[int, list[dict[str, Any]]]:
    """The exit code of `evalmode compare --require-same`, and its comparisons."""
    command = environment.python.with_name("evalmode")
    process = run(
        environment,
        *(command, "compare", bundle, "--provider", environment.name),
        *("--rows", ROWS, "--require-same", "--json"),
    )
    assert process.returncode in (0, 1), process.stderr
    comparisons = json.loads(process.stdout)["comparisons"]
    assert not [comparison["refusal"] for comparison in comparisons if comparison["refusal"]]
    return process.returncode, comparisons


def test_every_row_of_an_exact_bundle_has_the_same_bits_under_every_setting(
    environment: ProviderEnvironment, exact_bundle: Path
) -> None:
    code, comparisons = compare(environment, exact_bundle)
    assert [comparison["differing"] for comparison in comparisons] == [0] * len(comparisons)
    assert {comparison["rows"] for comparison in comparisons} == {ROWS}
    batches = [
        comparison["setting"]["batch_rows"]
        for comparison in comparisons
        if comparison["setting"]["provider"] == environment.name
    ]
    assert batches == [1, 32]
    assert code == 0


def test_the_provider_itself_gives_the_known_answers_of_an_exact_bundle(
    environment: ProviderEnvironment, exact_bundle: Path
) -> None:
    process = run(environment, SCRIPT, exact_bundle, environment.name)
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert report["answers"] >= 8
    assert report["differing"] == 0
    assert environment.name in report["provider"].lower()
    # No floating-point operator fell back to the CPU.
    assert report["float_operators_on_cpu"] == []
    operators = report["operators"][report["provider"]]
    assert {"MatMul", "Gather"} <= {*operators} or operators == ["OpenVINO-EP-subgraph_1"]


def test_most_rows_of_a_float32_bundle_have_other_bits_on_the_provider(
    environment: ProviderEnvironment, float32_bundle: Path
) -> None:
    code, comparisons = compare(environment, float32_bundle)
    assert code == 1
    on_provider = [
        comparison
        for comparison in comparisons
        if comparison["setting"]["provider"] == environment.name
    ]
    assert len(on_provider) == 2
    for comparison in on_provider:
        assert comparison["differing"] > ROWS // 2
        assert comparison["largest"] < FLOAT32_NOISE
