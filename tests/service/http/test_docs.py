"""The documentation page: it needs no other server, and its policy forbids nothing that it has."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import pytest
from fastapi import FastAPI

from evalmode.service.http import docs
from tests.service import processes
from tests.service.processes import RunningServer


class Page(HTMLParser):
    """The addresses that a browser loads for a page, and the scripts and styles inside of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.attributes: list[str] = []
        self.inline: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.attributes += [name for name, _ in attrs]
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style") and data.strip():
            self.inline.append(data)


@pytest.fixture(scope="module")
def app() -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None)
    docs.mount(app)
    return app


def get(app: Any, path: str) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test"
        ) as client:
            return await client.get(path)

    return asyncio.run(send())


def test_all_files_of_the_page_are_served_with_their_media_types(app):
    answer = get(app, "/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assets = {}
    for address in Page(answer.text).addresses:
        assert not urlsplit(address).netloc
        asset = get(app, urljoin("/docs", address))
        assert asset.status_code == 200
        media_type = asset.headers["content-type"].partition(";")[0]
        assets[address] = media_type, len(asset.content) > 100
    assert assets == {
        "docs/static/favicon.png": ("image/png", True),
        "docs/static/swagger-ui.css": ("text/css", True),
        "docs/static/swagger-ui-bundle.js": ("text/javascript", True),
        "docs/static/init.js": ("text/javascript", True),
    }


def test_the_page_has_no_inline_script_and_no_inline_style():
    page = Page(docs._PAGE)
    assert page.inline == []
    assert not [name for name in page.attributes if name == "style" or name.startswith("on")]


def test_the_style_sheet_loads_no_other_file(app):
    style = get(app, "/docs/static/swagger-ui.css").text
    addresses = re.findall(r"url\(\s*['\"]?([^'\")]{0,40})", style)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "@import" not in style


def test_the_policy_allows_requests_to_this_server_alone(app):
    policy = get(app, "/docs").headers["content-security-policy"]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == directives["connect-src"] == "'self'"
    assert directives["frame-ancestors"] == "'none'"
    assert "http" not in policy
    assert "unsafe-eval" not in policy


def test_the_script_loads_the_schema_and_no_validator(app):
    script = get(app, "/docs/static/init.js").text
    assert "validatorUrl: null" in script
    schema = re.search(r'url: "([^"]+)"', script)
    assert schema is not None
    answer = get(app, urljoin("/docs", schema.group(1)))
    assert answer.json()["openapi"].startswith("3.")
    assert "/docs" not in answer.json()["paths"]


@pytest.mark.parametrize(
    "path",
    [
        "redoc.standalone.js",
        "",
        "..%2f__init__.py",
        "../core.py",
        "%2e%2e/core.py",
        "swagger-ui.css/x",
        "%00",
    ],
)
def test_no_other_file_is_served(app, path):
    assert get(app, f"/docs/static/{path}").status_code == 404


KEY = "key-of-the-documentation"


@pytest.fixture(scope="module")
def guarded(bundle: Path) -> Iterator[RunningServer]:
    """A server that needs a key."""
    with processes.running(bundle, api_keys=KEY) as server:
        yield server


def test_with_the_key_as_password_a_browser_loads_the_page_and_its_files(guarded: RunningServer):
    """A browser gets a Basic challenge, asks its user, and sends the key with each request."""
    with httpx.Client(base_url=guarded.url) as client:
        challenge = client.get("/docs")
        assert challenge.status_code == 401
        assert 'Basic realm="' in challenge.headers["www-authenticate"]
        client.auth = ("", KEY)
        page = client.get("/docs")
        assert page.status_code == 200
        addresses = [urljoin("/docs", address) for address in Page(page.text).addresses]
        for path in [*addresses, "/openapi.json", "/v1/model", "/metrics"]:
            assert client.get(path).status_code == 200, path


@pytest.mark.parametrize("auth", [("", "another-key-of-the-tests"), ("user", ""), ("", "")])
def test_a_wrong_key_gets_the_challenge_again(guarded: RunningServer, auth: tuple[str, str]):
    answer = httpx.get(f"{guarded.url}/docs", auth=auth)
    assert answer.status_code == 401
    assert "Basic" in answer.headers["www-authenticate"]


@pytest.mark.parametrize("credentials", ["x", "=", "a2V5", "%" * 100, "\xff"])
def test_credentials_that_are_not_base64_are_refused(guarded: RunningServer, credentials: str):
    headers = {"authorization": b"Basic " + credentials.encode("latin-1")}
    assert httpx.get(f"{guarded.url}/docs", headers=headers).status_code == 401


def test_the_schema_declares_how_a_key_is_sent(
    guarded: RunningServer,
):
    schema = httpx.get(f"{guarded.url}/openapi.json", auth=("", KEY)).json()
    schemes = schema["components"]["securitySchemes"]
    assert schema["security"] == [{"bearer": []}, {"header": []}]
    assert (schemes["bearer"]["type"], schemes["bearer"]["scheme"]) == ("http", "bearer")
    assert (schemes["header"]["type"], schemes["header"]["in"]) == ("apiKey", "header")
    assert schema["paths"]["/livez"]["get"]["security"] == []
    assert "security" not in schema["paths"]["/v1/predict"]["post"]
    # What the page then sends, from its own origin, with the browser's Basic credentials replaced.
    for headers in ({"authorization": f"Bearer {KEY}"}, {schemes["header"]["name"]: KEY}):
        answer = httpx.post(
            f"{guarded.url}/v1/predict",
            json={"inputs": ["a"]},
            headers={"origin": guarded.url, **headers},
        )
        assert answer.status_code == 200


def test_a_key_that_a_browser_adds_to_requests_of_other_sites_is_ignored(
    guarded: RunningServer,
):
    def ask(**headers: str) -> httpx.Response:
        return httpx.post(
            f"{guarded.url}/v1/predict", json={"inputs": ["a"]}, auth=("", KEY), headers=headers
        )

    assert ask(origin=guarded.url).status_code == 200
    assert ask().status_code == 200
    refusal = ask(origin="http://evil.example")
    assert refusal.status_code == 401
    assert refusal.headers["www-authenticate"] == "Bearer"
    assert ask(origin="null").status_code == 401


def test_without_keys_the_schema_declares_none(service: RunningServer):
    schema = httpx.get(f"{service.url}/openapi.json").json()
    assert "security" not in schema
    assert "securitySchemes" not in schema["components"]
