"""Fixtures for tests of the service: a home folder, texts, a bundle, and a server of the bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.service.bundles import make_bundle
from tests.service.processes import RunningServer, running


@pytest.fixture(scope="session", autouse=True)
def _temporary_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The home folder holds recorded timings: tests neither read nor write those of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """200 texts in several scripts: empty, of every length the tiny model reads, and longer."""
    random = np.random.default_rng(11)
    words = [
        "Ez",
        "egy",
        "rövid",
        "mondat",
        "Dit",
        "is",
        "een",
        "これは",
        "Это",
        "7",
        "👍",
        "ﷺ",
        "long-winded",
        "2026",
    ]
    samples = ["", " ", "a", "\ud83d", "x" * 500]
    while len(samples) < 200:
        samples.append(" ".join(random.choice(words, random.integers(1, 10))))
    return samples


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="session")
def service(bundle: Path) -> Iterator[RunningServer]:
    with running(bundle, max_body_bytes=65_536, max_rows=256) as server:
        yield server
