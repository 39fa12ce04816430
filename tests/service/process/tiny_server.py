"""A program: a server process with a tiny application, for tests of everything but the models.

- `GET /` answers "pid N". The body of a POST to any path is read and echoed.
- `/gate...` answers when the file TINY_GATE exists.
- `/large` answers with 64 MB, and `/early` before the body is read.
- `/stuck?AforB` makes the process report for B seconds that a batch exceeds its time by A seconds.
- `/blocked` blocks the event loop for good, with a batch that is stuck.
- `/kept` never answers.
- `/settings` answers with some settings.
- `/load?NAME` and `/unload?NAME` change a model in every process, see `change`.
- `/statistics` answers with those of all processes, where each counts 1 failed request, and
  `/unloaded` with the models that were unloaded before the process started.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

from evalmode.errors import EvalmodeError
from evalmode.service.all_processes import AllProcesses
from evalmode.service.errors import BadRequest, RequestError, StartFailed, UnknownModel
from evalmode.service.health import Health
from evalmode.service.process.server import Service, serve
from evalmode.service.process.worker import work
from evalmode.service.settings import Settings, load_settings
from evalmode.service.telemetry.statistics import Statistics

GATE = Path(os.environ.get("TINY_GATE", "/nonexistent"))
MODE = Path(os.environ.get("TINY_MODE", "/nonexistent"))


class Tiny:
    """The application."""

    def __init__(self, settings: Settings, processes: AllProcesses) -> None:
        self.processes = processes
        self.stuck_s = 0.0
        self.health = Health(stuck_s=lambda: self.stuck_s, grace_s=settings.stuck_grace_s)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            while True:
                event = (await receive())["type"]
                if event == "lifespan.shutdown" and os.environ.get("TINY_CLOSING") == "never":
                    await asyncio.sleep(3600)
                await send({"type": f"{event}.complete"})
                if event == "lifespan.shutdown":
                    return
        status, body = await self.answer(scope, receive)
        start = {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-length", b"%d" % len(body))],
        }
        await send(start)
        await send({"type": "http.response.body", "body": body})

    async def answer(self, scope, receive) -> tuple[int, bytes]:
        path = scope["path"]
        if path == "/early":
            return 403, b"no"
        body = b""
        while path != "/large":
            message = await receive()
            if message["type"] == "http.disconnect":
                return 499, b""
            body += message["body"]
            if not message["more_body"]:
                break
        if path == "/readyz":
            reason = self.health.ready()
            return (503 if reason else 200), json.dumps({"error": reason}).encode()
        if path == "/livez":
            return (503 if self.health.live() else 200), b""
        if path == "/stuck":
            self.stuck_s, for_s = map(float, scope["query_string"].split(b"for"))
            asyncio.get_running_loop().call_later(for_s, setattr, self, "stuck_s", 0.0)
        while path.startswith("/gate") and not GATE.exists():
            await asyncio.sleep(0.01)
        if path == "/blocked":
            self.stuck_s = 3600.0
            time.sleep(3600)  # noqa: ASYNC251 - the event loop must be blocked
        if path == "/kept":
            await asyncio.sleep(3600)
        argument = scope["query_string"].decode()
        if path in ("/load", "/unload"):
            try:
                await self.processes.change(path[1:], argument)
            except RequestError as error:
                return error.status, str(error).encode()
        if path == "/statistics":
            return 200, json.dumps(await self.processes.figures("statistics")).encode()
        if path == "/unloaded":
            return 200, json.dumps(sorted(self.processes.unloaded)).encode()
        if path == "/settings":
            return 200, json.dumps(self.fields).encode()
        return 200, (body or b"pid %d" % os.getpid()) if path != "/large" else bytes(64_000_000)


def change(verb: str, name: str) -> None:
    """Write the change to the file TINY_CHANGES, after what the name asks for."""
    if name == "unknown":
        raise UnknownModel("there is no such model")
    if name == f"fails_in_{os.getpid()}":
        raise BadRequest(f"it cannot be loaded in {os.getpid()}")
    if name == "breaks":
        raise ZeroDivisionError
    if name == f"dies_in_{os.getpid()}":
        os.kill(os.getpid(), signal.SIGKILL)
    while name == "waits" and not GATE.exists():
        time.sleep(0.01)
    with Path(os.environ["TINY_CHANGES"]).open("a") as file:
        file.write(f"{os.getpid()} {verb} {name}\n")


def open_tiny(settings: Settings, processes: AllProcesses) -> Service:
    """The service, or another outcome if the file TINY_MODE says so.

    The file holds "refuse", "slow", "exit N", "die" (by SIGKILL) or "die N" (by signal N).
    """
    mode = MODE.read_text() if MODE.exists() else ""
    if mode == "refuse":
        raise StartFailed("the tiny server was told to refuse")
    if mode.startswith("die"):
        os.kill(os.getpid(), int(mode[3:] or signal.SIGKILL))
        time.sleep(30)  # another thread may receive the signal
    if mode.startswith("exit"):
        os._exit(int(mode[4:]))
    if mode == "slow":
        time.sleep(30)
    app = Tiny(settings, processes)
    statistics = Statistics()
    statistics.request_failed("tiny", "1", took_s=1)
    processes.offer(
        {
            "load": partial(change, "load"),
            "unload": partial(change, "unload"),
            "statistics": statistics.records,
            "metrics": list,
        }
    )
    app.fields = {
        "key": settings.api_keys.get_secret_value() if settings.api_keys else None,
        "drain_s": settings.drain_s,
    }
    return Service(app=app, health=app.health, log_fields={"bundle": "tiny"})


if __name__ == "__main__":
    if len(sys.argv) == 3:
        sys.exit(work(int(sys.argv[1]), int(sys.argv[2]), open_service=open_tiny))
    try:
        serve(load_settings(), open_service=open_tiny, worker=(sys.executable, __file__))
    except EvalmodeError as error:
        print(f"evalmode: {error}", file=sys.stderr)
        sys.exit(2)
