"""The application over a real model and a real engine, without a socket: what the tests of its
routes ask.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from evalmode.service.app import create_app
from evalmode.service.components import Components, open_components
from evalmode.service.settings import Settings, load_settings

Answer = httpx.Response


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server's parts, and how to ask them."""

    components: Components

    def ask(self, method: str, path: str, **given: Any) -> Answer:
        return self.asked(lambda client: client.request(method, path, **given))

    def infer(self, body: Any, *, model: str = "tiny", **given: Any) -> Answer:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"accept-encoding": "identity", **given.pop("headers", {})}
        return self.ask(
            "POST", f"/v2/models/{model}/infer", content=content, headers=headers, **given
        )

    def asked(self, ask: Callable[[httpx.AsyncClient], Awaitable[Answer]]) -> Answer:
        async def all_of_it() -> Answer:
            transport = httpx.ASGITransport(create_app(self.components))
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost"
            ) as client:
                return await ask(client)

        return asyncio.run(all_of_it())

    def but(self, **changed: Any) -> Served:
        """The same parts but for these; a mapping changes single settings."""
        if isinstance(settings := changed.get("settings"), Mapping):
            changed["settings"] = Settings(**{**self.components.settings.model_dump(), **settings})
        return Served(components=replace(self.components, **changed))


@contextmanager
def serving(root: Path, **settings: Any) -> Iterator[Served]:
    """The parts of a server of the bundles below `root`."""
    # Bundles made by the tests are opened without a trial, which takes half a second each.
    quick = {"load_timeout_s": 0, **settings}
    components = open_components(load_settings(bundle=root, poll_s=0, **quick))
    components.health.serve()
    try:
        yield Served(components=components)
    finally:
        components.close()


def text_input(texts: Sequence[str], **changed: Any) -> dict[str, Any]:
    return {
        "name": "text",
        "datatype": "BYTES",
        "shape": [len(texts)],
        "data": list(texts),
        **changed,
    }


def outputs_of(answer: Answer) -> dict[str, dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return {output["name"]: output for output in answer.json()["outputs"]}


def refusal(answer: Answer, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"}
    return body["error"]
