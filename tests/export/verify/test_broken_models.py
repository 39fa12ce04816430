"""A damaged model is verified or refused in one sentence, in seconds and in little memory.

The seeds are fixed: 300 files are read, and 60 of these are run too. `EVALMODE_FRESH=1` draws new
seeds.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from evalmode.export.verify import guarded
from evalmode.export.verify.options import DEFAULTS, Limits, Options
from evalmode.export.verify.targets import Target
from evalmode.export.verify.verify import Unreadable, examine
from tests.export.broken_models import damaged, models

GENERATED = Options(samples=(), limits=Limits(time_s=20, memory_mib=3000))
MOST_S = 10  # generous, since other processes may use the machine
FIRST_SEED = random.SystemRandom().randrange(1 << 32) if "EVALMODE_FRESH" in os.environ else 0


@pytest.mark.parametrize(
    ("options", "files"), [(DEFAULTS, 300), (GENERATED, 60)], ids=["read", "run"]
)
def test_a_damaged_model_is_verified_or_refused_in_a_sentence(
    options: Options, files: int, tmp_path: Path
) -> None:
    path, valid, outcomes = tmp_path / "any.onnx", models(), Counter[str]()
    guarded.load(options)  # starts the child process, which takes seconds
    for seed in range(FIRST_SEED, FIRST_SEED + files):
        path.write_bytes(damaged(valid[seed % len(valid)], random.Random(seed)))
        started = time.monotonic()
        answer = examine(Target(path=path), options)
        assert time.monotonic() - started < MOST_S, f"seed {seed} is slow"
        if isinstance(answer, Unreadable):
            outcomes["unreadable"] += 1
            assert answer.why.startswith(str(path)), f"seed {seed}: {answer.why}"
            assert "cannot be examined" not in answer.why, f"seed {seed}: {answer.why}"
        else:
            outcomes["verified"] += 1
            whys = [finding.why for record in answer.records for finding in record.findings]
            assert not any("ended with code" in why for why in whys), f"seed {seed}: {whys}"
    assert min(outcomes["unreadable"], outcomes["verified"]) > files // 10, outcomes


def test_the_models_are_valid_before_they_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(16))
    for number, model in enumerate(models()):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(model.SerializeToString())
        assert not isinstance(examine(Target(path=path)), Unreadable)
