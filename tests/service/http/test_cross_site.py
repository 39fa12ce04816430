"""Requests that load and unload models, and pages of other sites that may have sent them."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError
from starlette.requests import Request

from evalmode.service.errors import Forbidden, RequestError, UnsupportedMedia
from evalmode.service.http.cross_site import refuse_cross_site
from evalmode.service.settings import Settings
from tests.service import processes
from tests.service.processes import RunningServer

JSON = ("content-type", "application/json")
LOAD = "/v2/repository/models/tiny/load"
WAIT_S = 10


def refusal_of(headers: Sequence[tuple[str, str]], **settings: object) -> RequestError | None:
    raw = [(name.encode(), value.encode()) for name, value in headers]
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": raw})
    try:
        refuse_cross_site(request, Settings(**settings))
    except RequestError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("host", "bound"),
    [
        ("localhost", "127.0.0.1"),
        ("localhost:8000", "127.0.0.1"),
        ("LocalHost.:8000", "127.0.0.1"),
        ("evalmode.localhost:8000", "127.0.0.1"),
        ("127.0.0.1:8000", "127.0.0.1"),
        ("127.8.8.8", "127.0.0.1"),
        ("[::1]:8000", "::1"),
        ("[::1]:8000", "0.0.0.0"),
        ("192.168.1.7:8000", "0.0.0.0"),
        ("[2001:db8::7]:8000", "::"),
        ("192.168.1.7:8000", "192.168.1.7"),
        ("models.internal:8000", "models.internal"),
        (f"{socket.gethostname()}:8000", "0.0.0.0"),
    ],
)
def test_names_and_addresses_of_this_machine_are_accepted(host: str, bound: str):
    assert refusal_of([("host", host), JSON], host=bound) is None


@pytest.mark.parametrize(
    ("host", "bound"),
    [
        ("evil.example", "127.0.0.1"),
        ("evil.example:8000", "0.0.0.0"),
        ("localhost.evil.example", "127.0.0.1"),
        ("evillocalhost", "127.0.0.1"),
        ("127.0.0.1.evil.example", "127.0.0.1"),
        ("192.168.1.7", "127.0.0.1"),
        ("192.168.1.7", "localhost"),
        ("user@localhost", "127.0.0.1"),
        ("localhost:x", "127.0.0.1"),
        ("localhost, evil.example", "127.0.0.1"),
        ("", "127.0.0.1"),
        ("[", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
    ],
)
def test_another_name_is_refused_and_the_sentence_names_the_setting(host: str, bound: str):
    error = refusal_of([("host", host), JSON], host=bound)
    assert isinstance(error, Forbidden)
    assert error.field == "host"
    assert f"got {json.dumps(host)}" in str(error)
    assert "--control-hosts, EVALMODE_CONTROL_HOSTS" in str(error)


def test_no_host_and_two_hosts_are_refused():
    assert "got none" in str(refusal_of([JSON]))
    assert 'got "localhost, evil.example"' in str(
        refusal_of([("host", "localhost"), ("host", "evil.example"), JSON])
    )


def test_the_settings_can_allow_a_host_by_name_or_all_hosts():
    headers = [("host", "models.example:8000"), JSON]
    assert refusal_of(headers, control_hosts="other.example, Models.Example") is None
    assert refusal_of(headers, control_hosts="*") is None
    assert isinstance(refusal_of(headers, control_hosts="example"), Forbidden)


@pytest.mark.parametrize("name", ["http://models.example", "models.example:8000", "a b", "[::1]"])
def test_an_allowed_host_has_neither_a_scheme_nor_a_port(name: str):
    with pytest.raises(ValidationError, match="without a scheme and without a port"):
        Settings(control_hosts=(name,))


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "https://localhost:9000",
        "http://localhost",
        "null",
        "file://",
        "http://[",
        "http://localhost:99999",
        "",
    ],
)
def test_a_page_of_another_origin_is_refused(origin: str):
    error = refusal_of([("host", "localhost:8000"), JSON, ("origin", origin)])
    assert isinstance(error, Forbidden)
    assert error.field == "origin"
    assert "--cors-origins, EVALMODE_CORS_ORIGINS" in str(error)


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("localhost", "http://localhost"),
        ("localhost:443", "https://localhost"),
        ("localhost", "https://localhost"),
        ("[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_a_page_of_this_server_is_accepted(host: str, origin: str):
    assert refusal_of([("host", host), JSON, ("origin", origin)]) is None


@pytest.mark.parametrize("allowed", ["https://ops.example", "*"])
def test_a_page_of_an_allowed_origin_is_accepted(allowed: str):
    headers = [("host", "localhost"), JSON, ("origin", "https://ops.example")]
    assert refusal_of(headers, cors_origins=allowed) is None


@pytest.mark.parametrize(
    "content_types",
    [
        ["text/plain"],
        ["application/x-www-form-urlencoded"],
        ["multipart/form-data; boundary=x"],
        [""],
        ["application/json", "text/plain"],
    ],
)
def test_another_content_type_is_refused(content_types: list[str]):
    headers = [("content-type", value) for value in content_types]
    error = refusal_of([("host", "localhost"), *headers])
    assert isinstance(error, UnsupportedMedia)
    assert "send content-type application/json" in str(error)


def test_a_client_other_than_a_browser_may_leave_the_content_type_out():
    assert refusal_of([("host", "localhost")]) is None
    error = refusal_of([("host", "localhost"), ("origin", "http://localhost")])
    assert isinstance(error, UnsupportedMedia)
    assert "got none" in str(error)


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[RunningServer]:
    with processes.running(bundle) as server:
        yield server


def is_loaded(server: RunningServer) -> bool:
    return httpx.get(f"{server.url}/v2/models/tiny/ready").status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example", "content-type": "text/plain"}, 403),
        ({"origin": "http://evil.example", "content-type": "application/json"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "evil.example", "content-type": "application/json"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
    ],
)
@pytest.mark.parametrize("verb", ["load", "unload"])
@pytest.mark.parametrize("content", [b"", b"{}"])
def test_a_page_cannot_load_or_unload_a_model(
    server: RunningServer, headers: dict[str, str], status: int, verb: str, content: bytes
):
    url = f"{server.url}/v2/repository/models/tiny/{verb}"
    answer = httpx.post(url, content=content, headers=headers)
    assert answer.status_code == status
    assert answer.json().keys() == {"error"}
    assert is_loaded(server)


def test_a_raw_request_without_a_host_changes_nothing(server: RunningServer):
    with server.connect(timeout_s=WAIT_S) as connection:
        connection.sendall(
            b"POST /v2/repository/models/tiny/unload HTTP/1.0\r\ncontent-length: 0\r\n\r\n"
        )
        answer = b""
        while chunk := connection.recv(65_536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert b"got none" in answer
    assert is_loaded(server)


def test_clients_and_pages_of_the_server_can_load_a_model(server: RunningServer):
    same_origin = {"origin": server.url, "content-type": "application/json"}
    for headers in ({}, {"content-type": "application/json"}, same_origin):
        assert httpx.post(f"{server.url}{LOAD}", headers=headers).json() == {}
    assert is_loaded(server)
