"""Open bundles as a server does, but without calibration, and change their folders."""

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

OPEN_QUICKLY = partial(Model.open, calibration=Calibration(budget_s=0))
READY, LOADING, UNAVAILABLE = Presence


class Opener:
    """Opens bundles, and counts the openings of each path."""

    def __init__(self) -> None:
        self.openings: Counter[Path] = Counter()

    def __call__(self, path: Path) -> Model:
        self.openings[path] += 1
        return OPEN_QUICKLY(path)


def started_repository(root, opener=OPEN_QUICKLY, **arguments):
    repository = Repository(root, open_model=opener, **arguments)
    repository.start()
    return repository


def spoil(bundle):
    """Change a byte of the model, and return a function that restores it."""
    file = bundle / "model.onnx"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + b"?")
    return lambda: file.write_bytes(good)


def copy_bundle(source, target):
    """Copy a bundle over another one, file by file, as `cp` does."""
    shutil.copytree(source, target, dirs_exist_ok=True)


def states(repository):
    return {(entry.name, entry.version): entry.state for entry in repository.index()}


def answer(model, text="Dit is een zin."):
    ((bucket, row),), _ = model.text_rows([text])
    return content_of(bucket.run([row])[0])


def logged_duplicates(logs):
    """Each folder that the log names as not served, with the served folder of the same version."""
    return [(line["bundle"], line["served"]) for line in logs if "same version" in line["event"]]


def logged_refusals(logs):
    return [line for line in logs if line["event"] == "bundle refused"]
