"""The application with a real model and engine, without a socket, for tests of its routes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from evalmode.service.app import create_app
from evalmode.service.components import Components, open_components
from evalmode.service.settings import Settings, load_settings

Answer = httpx.Response


@dataclass(frozen=True, kw_only=True)
class Served:
    """The components of a server, and requests to an application of them."""

    components: Components

    def ask(self, method: str, path: str, **options: Any) -> Answer:
        return self.with_client(lambda client: client.request(method, path, **options))

    def infer(self, body: Any, *, model: str = "tiny", **options: Any) -> Answer:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"accept-encoding": "identity", **options.pop("headers", {})}
        return self.ask(
            "POST", f"/v2/models/{model}/infer", content=content, headers=headers, **options
        )

    def with_client(self, ask: Callable[[httpx.AsyncClient], Awaitable[Answer]]) -> Answer:
        async def run() -> Answer:
            transport = httpx.ASGITransport(create_app(self.components))
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost"
            ) as client:
                return await ask(client)

        return asyncio.run(run())

    def replace(self, **changes: Any) -> Served:
        """The same server with other components; a mapping `settings` changes only its keys."""
        if isinstance(settings := changes.get("settings"), Mapping):
            changes["settings"] = Settings(**{**self.components.settings.model_dump(), **settings})
        return Served(components=dataclasses.replace(self.components, **changes))


@contextmanager
def serving(root: Path, **settings: Any) -> Iterator[Served]:
    """A server of the bundles below `root`, without a socket."""
    # A trial of a bundle takes half a second, so the bundles of the tests are opened without one.
    quick = {"load_timeout_s": 0, **settings}
    components = open_components(load_settings(bundle=root, poll_s=0, **quick))
    components.health.serve()
    try:
        yield Served(components=components)
    finally:
        components.close()


def text_input(texts: Sequence[str], **changes: Any) -> dict[str, Any]:
    return {
        "name": "text",
        "datatype": "BYTES",
        "shape": [len(texts)],
        "data": list(texts),
        **changes,
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
