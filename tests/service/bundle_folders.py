"""Bundles that are opened as a server opens them, but not calibrated, and what is done to their
folders.
"""

from __future__ import annotations

import shutil
from collections import Counter
from functools import partial
from pathlib import Path

from evalmode.service.models.calibration import Calibration
from evalmode.service.models.model import Model
from evalmode.service.models.open_models import Presence
from evalmode.service.models.repository import Repository
from evalmode.service.models.tensors import content_of

WAIT_S = 30.0

QUICKLY = partial(Model.open, calibration=Calibration(budget_s=0))
READY, LOADING, UNAVAILABLE = Presence


class Opener:
    """Opens a bundle, and keeps count of how often it was asked to."""

    def __init__(self) -> None:
        self.asked: Counter[Path] = Counter()

    def __call__(self, path: Path) -> Model:
        self.asked[path] += 1
        return QUICKLY(path)


def started(root, opener=QUICKLY, **settings):
    repository = Repository(root, open_model=opener, **settings)
    repository.start()
    return repository


def spoil(bundle):
    """Change a byte of the model; what comes back undoes it."""
    file = bundle / "model.onnx"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + b"?")
    return lambda: file.write_bytes(good)


def put(source, target):
    """Put a bundle in the place of another, file by file, as `cp` does."""
    shutil.copytree(source, target, dirs_exist_ok=True)


def states(repository):
    return {(entry.name, entry.version): entry.state for entry in repository.index()}


def answer(model, text="Dit is een zin."):
    ((bucket, row),), _ = model.text_rows([text])
    return content_of(bucket.run([row])[0])


def passed_over(logs):
    """Which folders the log says are not served, each with the one that is."""
    return [(line["bundle"], line["served"]) for line in logs if "same version" in line["event"]]


def refusals(logs):
    return [line for line in logs if line["event"] == "bundle refused"]
