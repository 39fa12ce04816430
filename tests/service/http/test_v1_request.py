"""Requests to /v1/predict: their queries, their JSON bodies, and the sentence for each mistake."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalmode.service.errors import BadRequest, InvalidField
from evalmode.service.http.v1_request import (
    PredictQuery,
    parse_predict_query,
    parse_predict_request,
)
from evalmode.service.http.v1_schemas import ErrorResponse


def parse(body: bytes | object):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_predict_request(raw, max_rows=4, max_top_k=10)


def test_a_query_holds_the_options_of_a_prediction():
    items = [("top_k", "005"), ("truncate", "false"), ("model", "m"), ("version", "2")]
    assert parse_predict_query(items, max_top_k=5) == PredictQuery(
        top_k=5, truncate=False, model="m", version="2"
    )
    assert parse_predict_query([], max_top_k=5) == PredictQuery()


@pytest.mark.parametrize(
    ("items", "field", "sentence"),
    [
        ([("top_k", "0")], "top_k", 'top_k must be an integer from 1 to 100, got "0"'),
        ([("top_k", "101")], "top_k", 'top_k must be an integer from 1 to 100, got "101"'),
        ([("top_k", "")], "top_k", 'top_k must be an integer from 1 to 100, got ""'),
        ([("top_k", "-1")], "top_k", 'top_k must be an integer from 1 to 100, got "-1"'),
        ([("top_k", "\u0663")], "top_k", "top_k must be an integer from 1 to 100"),
        ([("top_k", "9" * 5000)], "top_k", f'must be an integer from 1 to 100, got "{"9" * 59}...'),
        ([("top_k", "1"), ("top_k", "1")], "top_k", "top_k is twice in the query"),
        ([("truncate", "True")], "truncate", 'truncate must be true or false, got "True"'),
        (
            [("topk", "1")],
            "topk",
            "topk is not a parameter of this query, which may hold top_k, truncate, model, version",
        ),
        ([("", "1")], '""', '"" is not a parameter of this query'),
        ([("a b\n", "1")], '"a b\\n"', '"a b\\n" is not a parameter'),
        ([("x" * 100, "1")], f'"{"x" * 59}...', "... is not a parameter"),
    ],
)
def test_a_wrong_query_names_the_parameter_and_its_value(items, field, sentence):
    with pytest.raises(InvalidField) as refusal:
        parse_predict_query(items, max_top_k=100)
    assert refusal.value.field == field
    assert sentence in str(refusal.value)


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
def test_a_body_that_is_not_json_is_a_bad_request(body):
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


def test_half_an_emoji_in_the_name_of_a_field_is_refused_with_its_escape():
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
def test_a_number_of_too_many_digits_is_named_and_not_repeated(body, field, sentence):
    with pytest.raises(BadRequest) as refusal:
        parse(body)
    assert refusal.value.field == field
    assert str(refusal.value) == sentence


def test_a_byte_order_mark_before_the_body_is_ignored():
    assert parse(b'\xef\xbb\xbf{"inputs": ["a"]}').inputs == ["a"]


def parse_with(body: dict[str, object], **query):
    raw = json.dumps(body).encode()
    return parse_predict_request(raw, max_rows=4, max_top_k=10, query=PredictQuery(**query))


def test_a_field_may_be_in_the_query_instead_of_the_body():
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
    assert str(refusal.value) == f"{name} is in the query and in the body: send it in one of them"


def test_half_an_emoji_is_accepted_as_a_text():
    assert parse(b'{"inputs": ["cut \\ud83d"]}').inputs == ["cut \ud83d"]


ANY_TEXT = st.text(st.characters(exclude_categories=()))
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | ANY_TEXT,
    lambda inner: (
        st.lists(inner) | st.dictionaries(ANY_TEXT | st.sampled_from(["inputs", "top_k"]), inner)
    ),
)


@given(st.binary() | ANY_JSON.map(json.dumps).map(str.encode))
def test_any_bytes_are_parsed_or_refused_with_a_sentence_of_ours(body):
    try:
        parse(body)
    except (BadRequest, InvalidField) as refusal:
        ErrorResponse(error=str(refusal), field=refusal.field).model_dump_json()
