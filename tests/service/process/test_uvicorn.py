"""The private parts of uvicorn on which service/process relies.

A new version that lacks one fails here with a sentence, and not in production.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from packaging.requirements import Requirement
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from evalmode.service.process.connection import Connection
from evalmode.service.process.graceful import GracefulServer
from evalmode.service.process.lingering_close import Connections, LingeringProtocol, Outlet
from evalmode.service.process.refusals import RefusingProtocol

# Methods that are overridden or called, with their parameters.
METHODS: dict[type, dict[str, list[str]]] = {
    HttpToolsProtocol: {
        "__init__": ["config", "server_state", "app_state", "_loop"],
        "connection_made": ["transport"],
        "connection_lost": ["exc"],
        "data_received": ["data"],
        "eof_received": [],
        "pause_writing": [],
        "resume_writing": [],
        "timeout_keep_alive_handler": [],
        "on_message_begin": [],
        "on_header": ["name", "value"],
        "on_headers_complete": [],
        "on_body": ["body"],
        "on_message_complete": [],
        "on_response_complete": [],
        "_unset_keepalive_if_required": [],
    },
    uvicorn.Server: {
        "__init__": ["config"],
        "run": ["sockets"],
        "serve": ["sockets"],
        "_serve": ["sockets"],
        "startup": ["sockets"],
        "main_loop": [],
        "on_tick": ["counter"],
        "shutdown": ["sockets"],
    },
    ServerState: {"__init__": []},
    FlowControl: {"pause_reading": [], "resume_reading": []},
}

# Attributes that are read or set.
ATTRIBUTES: dict[type, set[str]] = {
    HttpToolsProtocol: {
        "cycle",
        "flow",
        "headers",
        "loop",
        "parser",
        "server_state",
        "timeout_keep_alive",
        "timeout_keep_alive_task",
        "transport",
        "url",
    },
    RequestResponseCycle: {
        "disconnected",
        "keep_alive",
        "message_event",
        "on_response",
        "response_complete",
        "response_started",
        "transport",
    },
    uvicorn.Server: {"config", "lifespan", "server_state", "started"},
    FlowControl: {"resume_reading", "write_paused"},
    ServerState: {"connections", "default_headers", "tasks", "total_requests"},
    uvicorn.Config: {"http_protocol_class", "ssl"},
}
LIFESPAN = {"should_exit", "shutdown", "startup", "state"}

# An override takes effect only where uvicorn itself uses the name.
USES: list[tuple[Callable[..., Any], str]] = [
    (uvicorn.Server.run, "serve"),
    (uvicorn.Server._serve, "lifespan"),
    (uvicorn.Server._serve, "startup"),
    (uvicorn.Server._serve, "main_loop"),
    (uvicorn.Server._serve, "shutdown"),
    (HttpToolsProtocol.on_headers_complete, "on_response_complete"),
    (HttpToolsProtocol.on_headers_complete, "flow"),
    (RequestResponseCycle.receive, "flow"),
    (RequestResponseCycle.receive, "message_event"),
    (RequestResponseCycle.receive, "disconnected"),
    (RequestResponseCycle.send, "disconnected"),
    (RequestResponseCycle.send, "keep_alive"),
    (RequestResponseCycle.send, "on_response"),
    (RequestResponseCycle.send, "transport"),
]

ARGUMENTS_OF_CONFIG = {
    "access_log",
    "app",
    "http",
    "lifespan",
    "log_config",
    "loop",
    "reset_contextvars",
    "server_header",
    "ssl_context_factory",
    "timeout_keep_alive",
    "workers",
    "ws",
}

OURS: dict[type, list[type]] = {
    HttpToolsProtocol: [LingeringProtocol, RefusingProtocol, Connection],
    uvicorn.Server: [GracefulServer],
    ServerState: [Connections],
}


class SilentTransport(asyncio.Transport):
    """A transport that drops what is written."""

    def is_closing(self) -> bool:
        return False

    def write(self, data: Any) -> None:
        pass

    def close(self) -> None:
        pass


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture(scope="module")
def parts() -> dict[type, Any]:
    """An object of each class, after a request."""

    async def answered_request() -> dict[type, Any]:
        config = uvicorn.Config(answer, lifespan="on", log_config=None)
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        loop = asyncio.get_running_loop()
        protocol = HttpToolsProtocol(config, server.server_state, {}, loop)
        protocol.connection_made(SilentTransport())
        protocol.data_received(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.gather(*server.server_state.tasks)
        return {
            HttpToolsProtocol: protocol,
            RequestResponseCycle: protocol.cycle,
            uvicorn.Server: server,
            FlowControl: protocol.flow,
            ServerState: server.server_state,
            uvicorn.Config: config,
        }

    return asyncio.run(answered_request())


def lacking(name: str) -> str:
    return (
        f"uvicorn {uvicorn.__version__} has no {name}, on which evalmode.service.process relies:"
        " adapt it before the bound in pyproject.toml is raised"
    )


@pytest.mark.parametrize(
    ("owner", "name"),
    [(owner, name) for owner, methods in METHODS.items() for name in methods],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_each_overridden_method_exists_with_its_parameters(owner: type, name: str) -> None:
    expected = METHODS[owner][name]
    method = getattr(owner, name, None)
    assert method is not None, lacking(f"{owner.__name__}.{name}")
    _, *parameters = inspect.signature(method).parameters
    assert parameters == expected, lacking(f"{owner.__name__}.{name}({', '.join(expected)})")


def test_each_attribute_exists(parts: dict[type, Any]) -> None:
    for owner, names in ATTRIBUTES.items():
        for name in names:
            assert hasattr(parts[owner], name), lacking(f"{owner.__name__}.{name}")
    for name in LIFESPAN:
        assert hasattr(parts[uvicorn.Server].lifespan, name), lacking(f"lifespan.{name}")
    assert STATUS_LINE[431] == b"HTTP/1.1 431 Request Header Fields Too Large\r\n"


@pytest.mark.parametrize(
    ("function", "name"), USES, ids=lambda value: getattr(value, "__qualname__", value)
)
def test_uvicorn_calls_the_overridden_functions(function: Any, name: str) -> None:
    assert name in function.__code__.co_names, lacking(f"{name} in {function.__qualname__}")


def test_each_argument_of_the_configuration_exists() -> None:
    for name in ARGUMENTS_OF_CONFIG:
        parameters = inspect.signature(uvicorn.Config).parameters
        assert name in parameters, lacking(f"argument {name} of Config")


def test_an_outlet_has_every_method_of_a_transport_that_a_cycle_calls() -> None:
    source = inspect.getsource(RequestResponseCycle)
    called = set(re.findall(r"self\.transport\.(\w+)", source))
    assert called == {"close", "is_closing", "write"}
    assert called <= {*vars(Outlet), *Outlet.__init__.__code__.co_names}


def test_every_private_part_in_use_is_listed_here(parts: dict[type, Any]) -> None:
    sources = {
        owner: "".join(inspect.getsource(subclass) for subclass in ours)
        for owner, ours in OURS.items()
    }
    for owner, source in sources.items():
        used = set(re.findall(r"(?:self\.|super\(\)\.|def )(\w+)", source))
        inherited = {name for name in used if hasattr(parts[owner], name)}
        assert inherited <= ATTRIBUTES[owner] | METHODS[owner].keys()
    together = "".join(sources.values())
    for owner, variable in {
        RequestResponseCycle: "cycle",
        FlowControl: "flow",
        ServerState: "server_state",
        uvicorn.Config: "config",
    }.items():
        used = set(re.findall(rf"\b{variable}\.(\w+)", together))
        assert {name for name in used if hasattr(parts[owner], name)} == ATTRIBUTES[owner]
    assert set(re.findall(r"\blifespan\.(\w+)", together)) == LIFESPAN


def test_the_installed_version_is_within_the_bounds_of_pyproject() -> None:
    file = Path(__file__).parents[3] / "pyproject.toml"
    dependencies = tomllib.loads(file.read_text())["project"]["dependencies"]
    (uvicorns,) = [
        requirement
        for requirement in map(Requirement, dependencies)
        if requirement.name == "uvicorn"
    ]
    assert {specifier.operator for specifier in uvicorns.specifier} == {">=", "<"}
    assert uvicorn.__version__ in uvicorns.specifier
