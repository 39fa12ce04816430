"""Small made-up data to train on, and the smallest run that has everything: dropout, crops, epochs,
saved states.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evalmode.model.config import TrainConfig
from evalmode.model.learner import Learner
from evalmode.model.train import Result, fit

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


class Killed(BaseException):
    """The end of a run, as by a kill: no handler of ours or of Lightning's catches it."""


def train(
    data: Path, out: Path, *, resume: bool = False, overwrite: bool = False, **changes: object
) -> Result:
    config = small_run(data, **changes)
    result = fit(config, out=out, resume=resume, overwrite=overwrite, cache=out)
    assert result is not None
    return result


def watch_steps(monkeypatch: pytest.MonkeyPatch, *, die_at: int | None = None) -> list[int]:
    """A list that grows by each step from now on; at step `die_at` the run ends as by a kill."""
    training_step, steps = Learner.training_step, []

    def step(self, batch, batch_idx):
        if self.global_step == die_at:
            raise Killed
        steps.append(self.global_step)
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(Learner, "training_step", step)
    return steps


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed_run(data: Path, folder: Path, *, die_at: int) -> Path:
    """The folder of a training that ended at the step `die_at`, with the states it saved."""
    out = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        watch_steps(patch, die_at=die_at)
        with pytest.raises(Killed):
            train(data, out)
    return out


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.csv")


@pytest.fixture(scope="module")
def killed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that ended in the middle of its first epoch."""
    return killed_run(data, tmp_path_factory.mktemp("killed"), die_at=12)


@pytest.fixture
def out(killed: Path, tmp_path: Path) -> Path:
    """A copy of `killed` that a test may change."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A run sets the number of threads; the next test must not notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
