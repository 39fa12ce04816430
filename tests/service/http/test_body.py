from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalmode.service.errors import (
    BadRequest,
    BodyTooLarge,
    InvalidField,
    RequestTimeout,
    UnsupportedMedia,
)
from evalmode.service.http.body import parse_predict, read_body, require_json
from evalmode.service.http.query import PredictQuery
from evalmode.service.http.v1_schemas import ErrorResponse


def parse(body: bytes | object):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_predict(raw, max_rows=4, max_top_k=10)


class Chunks:
    """A body in chunks, which counts how many of its bytes were taken."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = chunks
        self.taken_bytes = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            self.taken_bytes += len(chunk)
            yield chunk


def read(chunks: Chunks, *, declared_bytes: str | None = None) -> bytes:
    return asyncio.run(
        read_body(aiter(chunks), declared_bytes=declared_bytes, max_body_bytes=10, silence_s=5)
    )


def test_a_body_of_the_limit_is_read_whole():
    assert read(Chunks(b"12345", b"67890"), declared_bytes="10") == b"1234567890"


def test_a_body_that_declares_too_much_is_refused_before_a_byte_is_read():
    chunks = Chunks(b"12345", b"678901")
    with pytest.raises(
        BodyTooLarge, match=r"10 bytes.*\(--max-body-bytes, EVALMODE_MAX_BODY_BYTES"
    ):
        read(chunks, declared_bytes="11")
    assert chunks.taken_bytes == 0


def test_a_body_that_declares_nothing_is_read_no_further_than_the_chunk_that_passes_the_limit():
    chunks = Chunks(b"12345", b"678901", b"more", b"and more")
    with pytest.raises(BodyTooLarge):
        read(chunks)
    assert chunks.taken_bytes == 11


def test_a_body_that_stops_coming_is_given_up():
    async def stopping() -> AsyncIterator[bytes]:
        yield b"12"
        await asyncio.Event().wait()

    with pytest.raises(RequestTimeout, match=r"nothing more of the body came for 0\.01 seconds"):
        asyncio.run(read_body(stopping(), declared_bytes="4", max_body_bytes=10, silence_s=0.01))


@pytest.mark.parametrize(
    "media",
    [
        None,
        "",
        "application/json",
        "Application/JSON; charset=utf-8",
        "application/x+json",
        "application/x-www-form-urlencoded",
    ],
)
def test_json_and_what_clients_say_when_nobody_told_them_are_taken_for_json(media):
    require_json(media)


@pytest.mark.parametrize(
    "media",
    ["text/plain", "multipart/form-data", "application/x-ndjson", "application/jsonx", "json"],
)
def test_a_body_that_declares_to_be_something_else_is_refused(media):
    with pytest.raises(UnsupportedMedia, match=media):
        require_json(media)


def test_a_request_has_defaults():
    request = parse({"inputs": ["a"]})
    assert (request.inputs, request.top_k, request.truncate) == (["a"], 3, True)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"inputs": [}',
        b'{"inputs": ["\xff"]}',
        b"[" * 100_000,
        b'{"inputs": NaN}',
        b"9" * 5_000,
    ],
    ids=["empty", "cut", "broken", "not utf-8", "deep", "nan", "a number of 5000 digits"],
)
def test_what_is_not_json_is_a_bad_request(body):
    with pytest.raises(BadRequest) as refusal:
        parse(body)
    assert refusal.value.field is None
    assert "\n" not in str(refusal.value)
    assert not re.search("codec|Expecting|delimiter|sys[.]|Exceeds", str(refusal.value))


@pytest.mark.parametrize(
    ("body", "field", "sentence"),
    [
        ({}, "inputs", "inputs is missing"),
        ({"inputs": "a"}, "inputs", 'inputs must be a list of at least 1 text, got "a"'),
        ({"inputs": None}, "inputs", "inputs must be a list of at least 1 text, got null"),
        ({"inputs": []}, "inputs", "inputs must be a list of at least 1 text, got []"),
        (
            {"inputs": ["a"] * 5},
            "inputs",
            (
                "inputs must hold at most 4 texts a request, got 5: split them, or raise setting"
                " max_rows (--max-rows, EVALMODE_MAX_ROWS)"
            ),
        ),
        ({"inputs": ["a", 17]}, "inputs.1", "inputs.1 must be a string, got 17"),
        ({"inputs": ["a", None]}, "inputs.1", "inputs.1 must be a string, got null"),
        ({"inputs": ["a"], "top_k": 0}, "top_k", "top_k must be an integer from 1 to 10, got 0"),
        ({"inputs": ["a"], "top_k": 11}, "top_k", "top_k must be an integer from 1 to 10, got 11"),
        (
            {"inputs": ["a"], "top_k": 10**4000},
            "top_k",
            f"top_k must be an integer from 1 to 10, got 1{'0' * 59}...",
        ),
        (
            {"inputs": ["a"], "top_k": -(10**4000)},
            "top_k",
            f"top_k must be an integer from 1 to 10, got -1{'0' * 58}...",
        ),
        (
            {"inputs": ["a"], "top_k": "3"},
            "top_k",
            'top_k must be an integer from 1 to 10, got "3"',
        ),
        (
            {"inputs": ["a"], "top_k": 3.0},
            "top_k",
            "top_k must be an integer from 1 to 10, got 3.0",
        ),
        (
            {"inputs": ["a"], "top_k": True},
            "top_k",
            "top_k must be an integer from 1 to 10, got true",
        ),
        ({"inputs": ["a"], "truncate": 1}, "truncate", "truncate must be true or false, got 1"),
        ({"inputs": ["a"], "model": 1}, "model", "model must be a string or null, got 1"),
        (
            {"inputs": ["a"], "": 7},
            '""',
            '"" is not a field of this request, which has inputs, top_k, model, version, truncate',
        ),
        (
            {"inputs": ["a"], "x" * 5000: 7},
            f'"{"x" * 59}...',
            (
                f'"{"x" * 59}... is not a field of this request, which has inputs, top_k, model,'
                " version, truncate"
            ),
        ),
        (
            {"inputs": ["a"], "topk": 3},
            "topk",
            (
                "topk is not a field of this request, which has inputs, top_k, model, version,"
                " truncate"
            ),
        ),
        (["a"], None, 'the body must be a JSON object with the field inputs, got ["a"]'),
        (
            "a" * 100,
            None,
            f'the body must be a JSON object with the field inputs, got "{"a" * 59}...',
        ),
    ],
)
def test_a_wrong_field_is_named_with_its_value(body, field, sentence):
    with pytest.raises(InvalidField) as refusal:
        parse(body)
    assert refusal.value.field == field
    assert str(refusal.value) == sentence


def test_half_an_emoji_in_the_name_of_a_field_is_refused_in_words_that_can_be_sent():
    with pytest.raises(InvalidField) as refusal:
        parse(b'{"inputs": ["a"], "\\ud83d": 1}')
    assert (
        str(refusal.value)
        == '"\\ud83d" is not a field of this request, which has inputs, top_k, model, version,'
        " truncate"
    )


@pytest.mark.parametrize(
    ("body", "field", "sentence"),
    [
        (
            b'{"inputs":["a"],"top_k":%s}' % (b"9" * 5000),
            "top_k",
            "top_k is a number of 5000 digits: a number may have at most 4300",
        ),
        (
            b'{"inputs":["a",{"":[1,-%s]}]}' % (b"9" * 4301),
            'inputs.1."".1',
            'inputs.1."".1 is a number of 4301 digits: a number may have at most 4300',
        ),
        (
            b"9" * 5000,
            None,
            "the body is a number of 5000 digits: a number may have at most 4300",
        ),
    ],
)
def test_a_number_of_too_many_digits_is_named_and_not_said_again(body, field, sentence):
    with pytest.raises(BadRequest) as refusal:
        parse(body)
    assert refusal.value.field == field
    assert str(refusal.value) == sentence


def test_a_byte_order_mark_before_the_body_is_passed_over():
    assert parse(b'\xef\xbb\xbf{"inputs": ["a"]}').inputs == ["a"]


def parse_with(body: dict[str, object], **query):
    raw = json.dumps(body).encode()
    return parse_predict(raw, max_rows=4, max_top_k=10, query=PredictQuery(**query))


def test_a_field_may_stand_in_the_query_instead_of_the_body():
    request = parse_with({"inputs": ["a"], "version": "2"}, top_k=1, truncate=False, model="m")
    assert (request.top_k, request.truncate, request.model, request.version) == (1, False, "m", "2")
    assert parse_with({"inputs": ["a"], "model": None}, model="m").model == "m"


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", 3), ("truncate", False), ("model", "m"), ("version", "1")]
)
def test_a_field_in_the_query_and_in_the_body_is_refused(name, value):
    with pytest.raises(InvalidField) as refusal:
        parse_with({"inputs": ["a"], name: value}, **{name: value})
    assert refusal.value.field == name
    assert (
        str(refusal.value) == f"{name} stands in the query and in the body: give it in one of them"
    )


def test_half_an_emoji_is_a_text_like_any_other():
    assert parse(b'{"inputs": ["cut \\ud83d"]}').inputs == ["cut \ud83d"]


ANY_TEXT = st.text(st.characters(exclude_categories=()))
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | ANY_TEXT,
    lambda inner: (
        st.lists(inner) | st.dictionaries(ANY_TEXT | st.sampled_from(["inputs", "top_k"]), inner)
    ),
)


@given(st.binary() | ANY_JSON.map(json.dumps).map(str.encode))
def test_whatever_the_bytes_they_are_a_request_or_one_of_our_sentences(body):
    try:
        parse(body)
    except (BadRequest, InvalidField) as refusal:
        ErrorResponse(error=str(refusal), field=refusal.field).model_dump_json()
