"""`bench/training.py`: both networks that it compares are one network."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "bench" / "training.py"


@pytest.fixture
def training() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("encoder_only", [False, True])
def test_with_the_same_weights_both_networks_have_the_same_logits(
    training: ModuleType, encoder_only: bool
) -> None:
    ours = training.Transformer(training.NETWORK).eval()
    theirs = training.TorchTransformer(training.NETWORK, encoder_only=encoder_only).eval()
    weights = ours.state_dict()
    names = {
        "attention_norm": "norm1",
        "feed_forward_norm": "norm2",
        "attention.out": "self_attn.out_proj",
        "feed_forward.up": "linear1",
        "feed_forward.down": "linear2",
        "attention.qkv.weight": "self_attn.in_proj_weight",
        "attention.qkv.bias": "self_attn.in_proj_bias",
    }
    renamed = {}
    for key, weight in weights.items():
        name = key.replace("blocks.", "encoder.layers.")
        for our_name, their_name in names.items():
            name = name.replace(f".{our_name}", f".{their_name}")
        renamed[name] = weight
    theirs.load_state_dict(renamed)  # raises if a weight is left over or missing
    ids = torch.randint(1, 65_536, (3, 8, 16), generator=torch.Generator().manual_seed(0))
    ids[0, 5:] = 0
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids))


def test_it_prints_a_ratio_for_each_comparison() -> None:
    command = [sys.executable, SCRIPT, "--seconds", "0.01", "--rounds", "1"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count(" to ") == 3
