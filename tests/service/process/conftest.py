"""What the tests of processes share: a gate for the tiny server, and a certificate for TLS."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def gate(tmp_path, monkeypatch) -> Path:
    """A file; what is asked below /gate is answered once it is there."""
    monkeypatch.setenv("TINY_GATE", str(tmp_path / "open"))
    return tmp_path / "open"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A folder with a self-signed certificate, its key, and the key once more behind the password
    'word'.
    """
    folder = tmp_path_factory.mktemp("tls")
    asked = "req -x509 -newkey rsa:2048 -nodes -days 2 -keyout key -out cert -subj /CN=localhost"
    for command in (
        f"{asked} -addext subjectAltName=IP:127.0.0.1",
        "rsa -aes256 -passout pass:word -in key -out locked",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder
