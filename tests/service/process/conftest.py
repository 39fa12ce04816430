"""Fixtures for tests of processes: a gate for the tiny server, and a certificate for TLS."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def gate(tmp_path, monkeypatch) -> Path:
    """A path. Requests below /gate are answered when this file exists."""
    monkeypatch.setenv("TINY_GATE", str(tmp_path / "open"))
    return tmp_path / "open"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A folder with a self-signed certificate, its key, and the key with the password "word"."""
    folder = tmp_path_factory.mktemp("tls")
    request = "req -x509 -newkey rsa:2048 -nodes -days 2 -keyout key -out cert -subj /CN=localhost"
    for command in (
        f"{request} -addext subjectAltName=IP:127.0.0.1",
        "rsa -aes256 -passout pass:word -in key -out locked",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder
