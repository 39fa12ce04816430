"""What the tests of processes share: a tiny server that waits where it is told to."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def gate(tmp_path, monkeypatch) -> Path:
    """A file; what is asked below /gate is answered once it is there."""
    monkeypatch.setenv("TINY_GATE", str(tmp_path / "open"))
    return tmp_path / "open"
