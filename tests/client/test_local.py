"""Answering lines with a bundle in this process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from evalmode.bundle.errors import BundleError
from evalmode.bundle.store import open_bundle
from evalmode.client.local import open_model
from tests.service.bundles import make_bundle


def test_lines_are_answered_in_order_with_the_digest_of_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # for the cache of measurements
    bundle = make_bundle(tmp_path)

    async def answer() -> tuple[list[bytes], str]:
        async with open_model(bundle, provider="cpu", top_k=1, truncate=True) as model:
            return await model.answer([b'"a text"', b"{", b'{"text": "a text"}'], first=5)

    lines, digest = asyncio.run(answer())
    answers = [json.loads(line) for line in lines]
    assert [answer["index"] for answer in answers] == [5, 6, 7]
    assert ["error" in answer for answer in answers] == [False, True, False]
    assert answers[0]["top"] == answers[2]["top"]
    assert len(answers[0]["top"]) == 1
    assert digest == open_bundle(bundle).digest


def test_a_folder_without_a_bundle_is_refused(tmp_path: Path) -> None:
    async def open_and_close() -> None:
        async with open_model(tmp_path, provider="cpu", top_k=1, truncate=True):
            pass

    with pytest.raises(BundleError, match="no bundle at"):
        asyncio.run(open_and_close())
