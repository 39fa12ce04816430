"""Small invented data, and the smallest run with all features: dropout, crops, epochs, states."""

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
    """A CSV of sentences, which a network learns to classify in one or two epochs."""
    generator = random.Random(0)
    lines: dict[str, None] = {}
    # The n-gram front end reads all digits alike, so a number cannot make a text unique.
    while len(lines) < rows:
        label = generator.choice(sorted(WORDS))
        text = " ".join(generator.choices(WORDS[label], k=generator.randint(1, 9)))
        lines[f"{text},{label}"] = None
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path


def small_run(data: Path, **changes: object) -> TrainConfig:
    """A run of two epochs of 13 steps, whose state is saved every 5 steps."""
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
    """Ends a run as a kill does: neither our handlers nor Lightning's catch a BaseException."""


def train(
    data: Path, out: Path, *, resume: bool = False, overwrite: bool = False, **changes: object
) -> Result:
    config = small_run(data, **changes)
    result = fit(config, out=out, resume=resume, overwrite=overwrite, cache=out)
    assert result is not None
    return result


def watch_steps(monkeypatch: pytest.MonkeyPatch, *, die_at: int | None = None) -> list[int]:
    """A list of the steps that run from now on; at step `die_at` the run ends as by a kill."""
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
    """The folder of a run that was killed at the step `die_at`, with its saved states."""
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
    """A run that was killed in the middle of its first epoch."""
    return killed_run(data, tmp_path_factory.mktemp("killed"), die_at=12)


@pytest.fixture
def out(killed: Path, tmp_path: Path) -> Path:
    """A copy of `killed` that a test may change."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Restore the number of threads, which a run sets."""
    thread_count = torch.get_num_threads()
    yield
    torch.set_num_threads(thread_count)
