"""HEAD on a real server: the status and the headers of GET, without a body."""

from __future__ import annotations

import httpx
import pytest

from tests.service.processes import RunningServer

WAIT_S = 10

# These differ between two requests.
_CHANGING = {"date", "x-request-id"}


def paths_of(service: RunningServer) -> list[str]:
    """All paths with GET: those of the OpenAPI schema, and those that it does not contain."""
    paths = httpx.get(f"{service.url}/openapi.json").json()["paths"]
    listed = [path for path, operations in paths.items() if "get" in operations]
    assert all("head" not in operations for operations in paths.values())
    static = [
        f"/docs/static/{name}"
        for name in ("swagger-ui.css", "swagger-ui-bundle.js", "favicon.png", "init.js")
    ]
    return [
        path.replace("{model}", "tiny").replace("{version}", "1")
        for path in [*listed, "/v2/", "/docs", "/openapi.json", *static, "/nosuch"]
    ]


def test_head_has_the_status_and_the_headers_of_get_and_no_body(service: RunningServer):
    paths = paths_of(service)
    assert {"/livez", "/metrics", "/v1/model", "/v2/models/tiny/ready"} <= set(paths)
    with httpx.Client(base_url=service.url) as client:
        for path in paths:
            by_get, by_head = client.get(path), client.head(path)
            changing = _CHANGING | ({"content-length"} if path == "/metrics" else set())
            assert by_head.status_code == by_get.status_code, path
            assert by_head.content == b""
            assert {k: v for k, v in by_head.headers.items() if k not in changing} == {
                k: v for k, v in by_get.headers.items() if k not in changing
            }, path


def test_a_connection_can_be_used_after_a_head_request(service: RunningServer):
    with service.connect(timeout_s=WAIT_S) as connection:
        connection.sendall(
            b"HEAD /v1/model HTTP/1.1\r\nhost: localhost\r\n\r\n"
            b"GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        )
        answer = b""
        while chunk := connection.recv(65_536):
            answer += chunk
    first, second, body = answer.split(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert second.startswith(b"HTTP/1.1 200 ")
    assert body == b'{"live":true,"ready":null}'


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/v1/model", "GET, HEAD"),
        ("DELETE", "/livez", "GET, HEAD"),
        ("PUT", "/openapi.json", "GET, HEAD"),
        ("HEAD", "/v1/predict", "POST"),
        ("GET", "/v1/predict", "POST"),
    ],
)
def test_another_method_is_refused_with_the_list_of_allowed_ones(
    service: RunningServer, method: str, path: str, allow: str
):
    answer = httpx.request(method, f"{service.url}{path}")
    assert answer.status_code == 405
    assert answer.headers["allow"] == allow
    if method != "HEAD":
        methods = allow.replace(", ", " and ")
        sentence = f"{path} does not answer {method}: it answers {methods}"
        assert answer.json()["error"] == sentence


def test_a_long_path_and_a_long_method_are_shortened(service: RunningServer):
    answer = httpx.get(f"{service.url}/{'x' * 5000}")
    assert answer.json()["error"] == f"there is nothing at /{'x' * 59}..."
