"""Fixtures: a folder for bundles, an opener that counts, and bundles to copy from."""

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
def originals(tmp_path_factory):
    """Bundles to copy from: tiny/1, tiny/1 with other labels, and tiny/2."""
    folder = tmp_path_factory.mktemp("originals")
    return {
        "1": make_bundle(folder / "a"),
        "1 changed": make_bundle(folder / "b", labels=("a", "b", "c", "d", "e")),
        "2": make_bundle(folder / "c", version="2"),
    }
