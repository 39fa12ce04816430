"""Folders of bundles that come and go."""

from __future__ import annotations

import pytest

from tests.service.bundle_folders import Opener
from tests.service.bundles import make_bundle


@pytest.fixture
def opener():
    return Opener()


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "bundles"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Bundles to copy from: two contents of tiny/1, and tiny/2."""
    folder = tmp_path_factory.mktemp("made")
    return {
        "1": make_bundle(folder / "a"),
        "1 anew": make_bundle(folder / "b", labels=("a", "b", "c", "d", "e")),
        "2": make_bundle(folder / "c", version="2"),
    }
