"""Small made-up data to train on, and the smallest run that has everything: dropout, crops, epochs,
saved states.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evalmode.model.config import TrainConfig

WORDS = {"animal": "cat dog cow hen fox owl".split(), "plant": "oak elm fir ivy fern moss".split()}  # noqa: SIM905


def write_rows(path: Path, *, rows: int = 230) -> Path:
    """A CSV of sentences of one word or another, which a network learns in an epoch or two."""
    draw = random.Random(0)
    lines: dict[str, None] = {}
    while len(lines) < rows:  # n-grams read all digits alike, so no number can tell texts apart
        label = draw.choice(sorted(WORDS))
        lines[f"{' '.join(draw.choices(WORDS[label], k=draw.randint(1, 9)))},{label}"] = None
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path


def small_run(data: Path, **changes: object) -> TrainConfig:
    """Two epochs of 13 steps; the state is saved every 5."""
    options: dict[str, object] = {
        "data": str(data),
        "frontend": "ngrams",
        "vocabulary": 400,
        "width": 16,
        "layers": 1,
        "heads": 2,
        "dropout": 0.2,
        "crop": 0.5,
        "epochs": 2,
        "batch_rows": 56,
        "save_steps": 5,
        "threads": 1,
    }
    return TrainConfig(**(options | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.csv")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A run sets the number of threads; the next test must not notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
