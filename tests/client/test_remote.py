"""Opening a client, and waiting between tries; tests/commands/test_predict.py sends requests."""

from __future__ import annotations

from email.utils import formatdate
from pathlib import Path

import pytest

from evalmode.client.remote import backoff_s, open_client, parse_retry_after
from evalmode.errors import EvalmodeError


def test_waits_grow_and_respect_retry_after() -> None:
    assert [parse_retry_after(header) for header in ("7", "99999", "soon", None)] == [
        7,
        120,
        None,
        None,
    ]
    assert parse_retry_after(formatdate(0, usegmt=True)) == 0
    for tries in range(1, 2000):
        assert 7 <= backoff_s(tries, 7) <= 7.5
        longest_s = min(30, 0.5 * 2 ** min(tries - 1, 10))
        assert longest_s / 2 <= backoff_s(tries, None) <= longest_s


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://", "http:///x", ""])
def test_an_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(EvalmodeError, match="--url"):
        open_client(url, api_key=None, ca=None, connections=1)


@pytest.mark.parametrize(
    ("api_key", "ca"), [("kéy", None), ("a\nb", None), (None, Path("absent.pem"))]
)
def test_an_invalid_api_key_or_authority_file_is_refused(
    api_key: str | None, ca: Path | None
) -> None:
    with pytest.raises(EvalmodeError):
        open_client("http://localhost", api_key=api_key, ca=ca, connections=1)
