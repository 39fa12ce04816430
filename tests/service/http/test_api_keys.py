"""API keys: which requests need one, how the keys change, and that no key is logged."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import httpx
import pytest
import structlog

from evalmode.service.errors import StartFailed
from evalmode.service.http.api_keys import ApiKeys, RequireKey
from evalmode.service.settings import Settings

FIRST = "first-key-of-the-tests"
SECOND = "second-key-of-the-tests"
THIRD = "third-key-of-the-tests"


class Clock:
    """A clock that stands still until a test sets it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class App:
    """Reads the body and answers 200, and records the paths of its requests."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    async def __call__(self, scope, receive, send):
        self.paths.append(scope.get("path", scope["type"]))
        if scope["type"] != "http":
            return
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


def send(
    app, path: str = "/v1/predict", *, method: str = "POST", content=None, **headers: str
) -> httpx.Response:
    async def request() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test"
        ) as client:
            sent_headers = {name.replace("_", "-"): value for name, value in headers.items()}
            return await client.request(method, path, headers=sent_headers, content=content)

    return asyncio.run(request())


def guarded(*keys: str) -> RequireKey:
    return RequireKey(App(), ApiKeys(keys or [FIRST]))


def test_without_keys_in_the_settings_no_key_is_needed():
    assert ApiKeys.of(Settings()) is None


@pytest.mark.parametrize("separator", [",", " ", "\n", ", ", " ,\t"])
def test_several_keys_are_valid_at_once_so_that_they_can_be_rotated(separator):
    keys = ApiKeys.of(Settings(api_keys=f"{FIRST}{separator}{SECOND}"))
    assert keys.is_valid(FIRST.encode())
    assert keys.is_valid(SECOND.encode())
    assert not keys.is_valid(THIRD.encode())
    assert not keys.is_valid(b"")


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {FIRST}"},
        {"authorization": f"bearer   {FIRST} "},
        {"x_api_key": FIRST},
        {"authorization": "Basic dTpw", "x_api_key": FIRST},
        {"authorization": "Bearer something-from-a-proxy", "x_api_key": FIRST},
    ],
)
def test_a_key_is_read_from_either_header(headers):
    assert send(guarded(), **headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": FIRST},
        {"authorization": f"Basic {FIRST}"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": f"Bearer {FIRST}x"},
        {"authorization": f"Bearer {FIRST[:-1]}"},
        {"x_api_key": FIRST.upper()},
        {"x_api_key": f"{FIRST},{FIRST}"},
    ],
)
def test_without_a_valid_key_the_response_is_401_and_explains_how_to_send_one(headers):
    answer = send(guarded(), **headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["field"] is None
    assert "X-API-Key" in answer.json()["error"]
    assert FIRST not in answer.text


@pytest.mark.parametrize("path", ["/v2", "/v2/", "/v2/models/languages/infer"])
def test_a_refusal_of_v2_has_no_field_but_error(path):
    assert list(send(guarded(), path).json()) == ["error"]


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/v2/health/live", "/v2/health/ready"])
def test_probes_need_no_key(path):
    assert send(guarded(), path, method="GET").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/metrics", "/docs", "/openapi.json", "/v1/model", "/", "/livez/", "/livez/../metrics",
        "//livez", "/v2/health/../models/m/infer", "/v2/health/%2e%2e/models", "/LIVEZ",
        "/livez%2f..%2fmetrics",
    ],
)  # fmt: skip
def test_all_else_needs_one_however_its_path_is_sent_headers(path):
    assert send(guarded(), path, method="GET").status_code == 401


def test_a_refusal_does_not_read_the_body():
    messages = []

    async def refuse() -> list[dict]:
        sent: list[dict] = []

        async def receive():
            messages.append("a message")
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/predict",
            "headers": [(b"expect", b"100-continue")],
        }
        await guarded()(scope, receive, send)
        return sent

    assert asyncio.run(refuse())[0]["status"] == 401
    assert messages == []


def test_a_websocket_needs_a_key_and_the_start_of_the_server_does_not():
    app = App()
    sent: list[dict] = []

    async def send(message):
        sent.append(message)

    async def call() -> None:
        guard = RequireKey(app, ApiKeys([FIRST]))
        await guard({"type": "lifespan"}, None, send)
        await guard({"type": "websocket", "path": "/livez", "headers": []}, None, send)

    asyncio.run(call())
    assert app.paths == ["lifespan"]
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ("short", "5 characters"),
        (f"{FIRST} fifteen-letters", "15 characters"),
        (" , ", "no key"),
        ("", "no key"),
    ],
)
def test_a_server_with_a_short_key_or_none_does_not_start_and_prints_no_key(keys, sentence):
    with pytest.raises(StartFailed, match=sentence) as error:
        ApiKeys.of(Settings(api_keys=keys))
    assert "short" not in str(error.value)
    assert FIRST not in str(error.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        (b"", "no key"),
        (b"# nobody\n\n", "no key"),
        (b"first-key-of-the-tests\nshort\n", "line 2"),
        (b"\xff\xfe\x00 not text", "UTF-8"),
        (b"#" * (1 << 20) + b"\n" + FIRST.encode(), "bytes"),
    ],
)
def test_a_server_with_a_bad_file_of_keys_does_not_start(tmp_path, content, sentence):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(StartFailed, match=sentence) as error:
        ApiKeys.of(Settings(api_keys_file=file))
    assert str(file) in str(error.value)
    assert FIRST not in str(error.value)


def keys_of(file: Path, *keys: str) -> tuple[ApiKeys, Clock]:
    clock = Clock()
    return ApiKeys(keys, file=file, clock=clock), clock


def test_a_file_of_keys_has_one_a_line_and_comments(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# of ours\n{FIRST}\n\n  {SECOND}  \r\n#{THIRD}\n")
    keys, _ = keys_of(file, "given-key-of-the-tests")
    valid = [
        key
        for key in (FIRST, SECOND, THIRD, "given-key-of-the-tests")
        if keys.is_valid(key.encode())
    ]
    assert valid == [FIRST, SECOND, "given-key-of-the-tests"]


@pytest.mark.parametrize("renamed", [False, True])
def test_a_file_that_changes_is_read_again_within_a_second(tmp_path, renamed):
    file = tmp_path / "keys"
    file.write_text(FIRST)
    keys, clock = keys_of(file)
    other = tmp_path / "other" if renamed else file
    other.write_text(SECOND)
    other.rename(file)
    assert keys.is_valid(FIRST.encode())
    clock.now_s = 1.0
    assert keys.is_valid(SECOND.encode())
    assert not keys.is_valid(FIRST.encode())


def test_a_change_that_no_time_stamp_shows_is_noticed(tmp_path):
    file = tmp_path / "keys"
    file.write_text(FIRST)
    keys, clock = keys_of(file)
    before = file.stat()
    file.write_text("FIRST" + FIRST[5:])

    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    clock.now_s = 1.0
    assert not keys.is_valid(FIRST.encode())


@pytest.mark.parametrize("damage", ["emptied", "gone", "too short", "a folder"])
def test_a_file_that_breaks_later_leaves_the_keys_as_they_were_and_is_logged_once(tmp_path, damage):
    file = tmp_path / "keys"
    file.write_text(FIRST)
    keys, clock = keys_of(file)
    if damage in ("gone", "a folder"):
        file.unlink()
    if damage == "a folder":
        file.mkdir()
    if damage in ("emptied", "too short"):
        file.write_text("" if damage == "emptied" else f"{SECOND}\nshort-secret")
    with structlog.testing.capture_logs() as logged:
        for now_s in (1.0, 2.0, 3.0):
            clock.now_s = now_s
            assert keys.is_valid(FIRST.encode())
    assert [line["log_level"] for line in logged] == ["error"]
    assert "short-secret" not in str(logged)


def test_a_file_that_is_mended_is_read_again(tmp_path):
    file = tmp_path / "keys"
    file.write_text(FIRST)
    keys, clock = keys_of(file)
    for now_s, content, key in (
        (1.0, "", FIRST),
        (2.0, SECOND, SECOND),
        (3.0, SECOND, SECOND),
        (4.0, FIRST, FIRST),
    ):
        file.write_text(content)
        clock.now_s = now_s
        assert keys.is_valid(key.encode())


def test_no_key_is_ever_logged_or_printed(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "keys"
    file.write_text(FIRST)
    settings = Settings(api_keys=SECOND, api_keys_file=file)
    with structlog.testing.capture_logs() as logged:
        keys, clock = keys_of(file, SECOND)
        guard = RequireKey(App(), keys)
        send(guard, authorization=f"Bearer {FIRST}")
        file.write_text(f"{THIRD}\n{FIRST}")
        clock.now_s = 1.0
        send(guard, authorization=f"Bearer {THIRD}x")
        file.write_text(f"{THIRD}\nshort")
        clock.now_s = 2.0
        send(guard, x_api_key=THIRD)
    assert [line["event"] for line in logged] == ["API keys read", "the API keys stay as they were"]
    everything = f"{logged} {caplog.text} {settings!r} {keys!r} {vars(keys)!r} {guard!r}"
    assert not [key for key in (FIRST, SECOND, THIRD) if key in everything]
