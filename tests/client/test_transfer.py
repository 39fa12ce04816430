"""Failures while a file of texts is answered."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from evalmode.client.answers_file import Stdout
from evalmode.client.remote import RemoteServer, open_client
from evalmode.client.transfer import Source, Transfer
from evalmode.errors import EvalmodeError


class Refusing:
    """Refuses every chunk, and the first of them after the others."""

    def __init__(self, chunks: int) -> None:
        self._refused = asyncio.Semaphore(0)
        self._later_chunks = chunks - 1

    async def answer(self, lines: Sequence[bytes], *, first: int) -> tuple[list[bytes], str]:
        if first == 0:
            for _ in range(self._later_chunks):
                await self._refused.acquire()
        self._refused.release()
        raise EvalmodeError(f"refused {first}")


def test_when_several_chunks_fail_only_the_first_is_reported(
    tmp_path: Path,
) -> None:
    (tmp_path / "texts.jsonl").write_text('"a"\n' * 4)
    source = Source(path=tmp_path / "texts.jsonl", chunk_lines=1)
    complaints: list[dict[str, Any]] = []

    async def transfer() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: complaints.append(context)
        )
        with pytest.raises(EvalmodeError, match="refused 0"):
            await Transfer(source=source, backend=Refusing(4), writer=Stdout(), concurrency=4).run()
        gc.collect()

    asyncio.run(transfer())
    gc.collect()
    assert complaints == []


def test_a_password_in_the_address_is_not_shown() -> None:
    async def ask() -> None:
        async with open_client(
            "http://user:geheim@127.0.0.1:9/at", api_key=None, ca=None, connections=1
        ) as client:
            await RemoteServer(client=client, query={}, retries=0).answer([b'"a"'], first=0)

    with pytest.raises(EvalmodeError, match=r"^http://127.0.0.1:9/at did not answer"):
        asyncio.run(ask())


def test_a_port_above_65535_is_refused() -> None:
    with pytest.raises(EvalmodeError, match="a port is at most 65535"):
        open_client("http://localhost:99999", api_key=None, ca=None, connections=1)
