"""Folders of bundles that come and go."""

from __future__ import annotations

import pytest

from tests.service.bundle_folders import Opener


@pytest.fixture
def opener():
    return Opener()


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "bundles"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, bundles):
    """Bundles to copy from: two contents of tiny/1, and tiny/2."""
    folder = tmp_path_factory.mktemp("made")
    return {
        "1": bundles.make(folder / "a"),
        "1 anew": bundles.make(folder / "b", labels=("a", "b", "c", "d", "e")),
        "2": bundles.make(folder / "c", version="2"),
    }
