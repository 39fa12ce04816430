"""Exact bundles on processors that this machine does not have, emulated by QEMU.

A process there must not start another one: QEMU would run it on this machine's processor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TEXTS
from tests.machines.conftest import LABELS
from tests.machines.environments import ROOT, aarch64_command, x86_command

pytestmark = [pytest.mark.machines, pytest.mark.slow]

SCRIPT = ROOT / "bench" / "gpu.py"
IDENTICAL = "identical to the known answers"
# NumPy's names of AVX2 and fused multiply-add: "X86_V3" since 2.4, before that each by itself.
AVX2 = {"X86_V3", "AVX2"}
AVX512 = {"X86_V4", "AVX512_SKX"}


def this_machine() -> list[str]:
    return [sys.executable]


def nehalem() -> list[str]:
    """SSE 4.2: neither AVX nor fused multiply-add."""
    return x86_command("Nehalem", sys.executable)


def haswell() -> list[str]:
    """AVX2 with fused multiply-add, and no VNNI: sums of two products of bytes have 16 bits."""
    return x86_command("Haswell", sys.executable)


Command = Callable[[], list[str]]
PROCESSORS: list[Command] = [nehalem, haswell, aarch64_command]


def run_on(command: Command, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The process of a Python with these arguments on this processor."""
    return subprocess.run(
        [*command(), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def known_answers_on(command: Command, bundle: Path) -> dict[str, Any]:
    """What `bench/gpu.py` reports on this processor."""
    process = run_on(
        command,
        *(SCRIPT, bundle, "--provider", "cpu", "--known-answers", "--settings", "default"),
    )
    assert process.returncode == 0, process.stderr
    report: dict[str, Any] = json.loads(process.stdout)
    return report


def predictions_on(command: Command, bundle: Path) -> str:
    """The JSON of `evalmode predict`, which has the scores of every label."""
    process = run_on(
        command,
        *("-m", "evalmode", "predict", "--bundle", bundle, "--json", "--top-k", LABELS, *TEXTS),
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize("processor", PROCESSORS)
def test_an_exact_bundle_has_the_same_bits_on_every_processor(
    processor: Command, exact_bundle: Path
) -> None:
    report = known_answers_on(processor, exact_bundle)
    instructions = {*report["processor"]["instructions"]}
    if processor is aarch64_command:
        assert report["processor"]["architecture"] == "aarch64"
    else:
        assert bool(instructions & AVX2) == (processor is haswell)
        assert not instructions & AVX512
    assert report["default"]["verdict"] == IDENTICAL
    assert report["default"]["known_answers"]["answers"] >= 8


@pytest.mark.parametrize("processor", PROCESSORS)
def test_settings_change_no_bit_of_an_exact_bundle_on_any_processor(
    processor: Command, exact_bundle: Path
) -> None:
    process = run_on(
        processor,
        *("-m", "evalmode", "compare", exact_bundle, "--rows", 16, "--require-same", "--json"),
    )
    assert process.returncode == 0, process.stderr
    settings = [item["setting"] for item in json.loads(process.stdout)["comparisons"]]
    # aarch64 has other codes for them than x86.
    assert {"down", "up", "toward zero"} <= {setting["rounding"] for setting in settings}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_texts_have_the_same_scores_on_every_processor(
    processor: Command, exact_bundle: Path
) -> None:
    predictions = predictions_on(processor, exact_bundle)
    assert predictions.count('"score":') == (LABELS + 1) * len(TEXTS)
    assert predictions == predictions_on(this_machine, exact_bundle)


# A float32 bundle may have the same bits on a Haswell as on newer x86 processors.
@pytest.mark.parametrize("processor", [nehalem, aarch64_command])
def test_a_float32_bundle_has_other_bits_on_another_processor(
    processor: Command, float32_bundle: Path
) -> None:
    report = known_answers_on(processor, float32_bundle)
    answers = report["default"]["known_answers"]
    assert answers["recorded"]["bitwise_equal"] == 0
    assert 0 < answers["recorded"]["largest_difference_in_deviations"] < 1e-5


def test_a_float32_bundle_has_other_scores_on_aarch64(float32_bundle: Path) -> None:
    # It opens there because its certificate has a tolerance for other platforms. An emulated x86
    # processor does not count as another one: QEMU shows the features of the real one.
    here = predictions_on(this_machine, float32_bundle)
    assert predictions_on(aarch64_command, float32_bundle) != here


def test_products_of_8_bits_saturate_without_vnni_as_the_certificate_warns(
    saturating_bundle: Path,
) -> None:
    report = known_answers_on(haswell, saturating_bundle)
    answers = report["default"]["known_answers"]
    assert answers["recorded"]["bitwise_equal"] < answers["answers"]
    assert answers["recorded"]["largest_difference_in_deviations"] > 1e-3
