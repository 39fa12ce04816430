"""A small checkpoint, which looks trained, and its bundle: shared by the tests of several rooms."""

from __future__ import annotations

import os
from pathlib import Path

# Several test processes share the cores, so more threads would only wait for one another. torch
# reads the variable when it is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from evalmode.bundle.frontend import NgramFrontEnd, NgramSpec
from evalmode.export.from_checkpoint import release_checkpoint
from evalmode.export.release import Released
from evalmode.model.checkpoint import Checkpoint, HeldOut
from evalmode.model.config import TransformerConfig
from evalmode.model.transformer import Transformer

TEXTS = (
    "",
    "Ez egy rövid mondat.",
    "Dit is een zin.",
    "Это предложение на русском языке, и оно длиннее других предложений в этом списке.",
    "2026-11-20",
    "これは文です。",
    "a",
    "word " * 40,
)


def small_config(**changes: object) -> TransformerConfig:
    """A network with a rate at every dropout site, small enough to export in a second or two."""
    sizes = {
        "vocabulary": 512,
        "labels": 5,
        "positions": 16,
        "ids_per_position": 16,
        "width": 16,
        "layers": 2,
        "heads": 2,
    }
    return TransformerConfig(**{**sizes, "feed_forward": 32, "ngram_dropout": 0.3, **changes})  # type: ignore[arg-type]


def make_checkpoint(module: torch.nn.Module, *, labels: int = 5) -> Checkpoint:
    """A checkpoint, as `model.checkpoint.load` returns it, of any module that reads n-gram ids."""
    spec = NgramSpec(vocabulary=512, lengths=(4, 16))
    frontend = NgramFrontEnd(spec)
    rows = [frontend.encode(text).ids for text in TEXTS * 4]
    return Checkpoint(
        module=module,
        frontend=spec,
        tokenizer=None,
        labels=tuple(f"label {index}" for index in range(labels)),
        held_out=HeldOut(rows=rows, labels=np.arange(len(rows), dtype=np.int64) % labels),
        sample_texts=TEXTS,
        metrics={"test": {"accuracy": 0.2, "macro_f1": 0.2}},
        provenance={"seed": 0},
    )


@pytest.fixture
def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    module = Transformer(small_config())
    for parameter in module.parameters():
        # An untrained head gives nearly the same answer to every text.
        torch.nn.init.normal_(parameter, std=0.3)
    return make_checkpoint(module)


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    torch.manual_seed(0)
    module = Transformer(small_config())
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    root: Path = tmp_path_factory.mktemp("bundles")
    return release_checkpoint(
        make_checkpoint(module), root=root, name="small", version="1", progress=lambda step: None
    )
