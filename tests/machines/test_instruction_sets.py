"""Exact bundles on processors that this machine does not have, emulated by QEMU.

`bench/gpu.py` compares the known answers. It needs only NumPy and ONNX Runtime, which is all that
the aarch64 environment has.
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

from tests.machines.environments import ROOT, aarch64_command, x86_command

pytestmark = [pytest.mark.machines, pytest.mark.slow]

SCRIPT = ROOT / "bench" / "gpu.py"
IDENTICAL = "identical to the known answers"
# NumPy's names of AVX2 and fused multiply-add: "X86_V3" since 2.4, before that each by itself.
AVX2 = {"X86_V3", "AVX2"}
AVX512 = {"X86_V4", "AVX512_SKX"}


def nehalem() -> list[str]:
    """SSE 4.2: neither AVX nor fused multiply-add."""
    return x86_command("Nehalem", sys.executable)


def haswell() -> list[str]:
    """AVX2 with fused multiply-add, and no VNNI: sums of two products of bytes have 16 bits."""
    return x86_command("Haswell", sys.executable)


Command = Callable[[], list[str]]
PROCESSORS: list[Command] = [nehalem, haswell, aarch64_command]


def known_answers_on(command: Command, bundle: Path) -> dict[str, Any]:
    """The report of the script on this processor."""
    arguments = [str(bundle), "--provider", "cpu", "--known-answers", "--settings", "default"]
    process = subprocess.run(
        [*command(), str(SCRIPT), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    report: dict[str, Any] = json.loads(process.stdout)
    return report


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


# A float32 bundle may have the same bits on a Haswell as on newer x86 processors.
@pytest.mark.parametrize("processor", [nehalem, aarch64_command])
def test_a_float32_bundle_has_other_bits_on_another_processor(
    processor: Command, float32_bundle: Path
) -> None:
    report = known_answers_on(processor, float32_bundle)
    answers = report["default"]["known_answers"]
    assert answers["recorded"]["bitwise_equal"] == 0
    assert 0 < answers["recorded"]["largest_difference_in_deviations"] < 1e-5


def test_products_of_8_bits_saturate_without_vnni_as_the_certificate_warns(
    saturating_bundle: Path,
) -> None:
    report = known_answers_on(haswell, saturating_bundle)
    answers = report["default"]["known_answers"]
    assert answers["recorded"]["bitwise_equal"] < answers["answers"]
    assert answers["recorded"]["largest_difference_in_deviations"] > 1e-3
