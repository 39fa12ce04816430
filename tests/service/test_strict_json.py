"""The strict JSON parser of requests, and values as error messages show them."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evalmode.service.errors import BadRequest
from evalmode.service.strict_json import parse_json, shown, shown_flat, shown_key, whole_number


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"[" * 100_000, "the line is nested too deeply"),
        (b"NaN", "the line is not valid JSON: NaN is not a JSON number, at character 1: send a"),
        (b"-Infinity", "the line is not valid JSON: -Infinity is not a JSON number"),
        (
            b'"a\xff"',
            "the line is not valid JSON: it is not UTF-8, the byte 0xff at position 2 does not"
            " begin a character",
        ),
        (b"", "the line is empty: it must be JSON"),
        (b" \n\t", "the line is empty: it must be JSON"),
        (b"{", "the line is not valid JSON: it ends too early, at character 2"),
        (b'{"a": ', "the line is not valid JSON: it ends too early"),
        (b'{"a": x}', "the line is not valid JSON: the word x is not in quotes, at character 7"),
        (
            b'{"a": 1\n x}',
            "the line is not valid JSON: a comma is missing between two values, at l",
        ),
        (b"{a: 1}", "the line is not valid JSON: the key a is not in quotes, at character 2"),
        (b'{"a" 1}', "the line is not valid JSON: a colon is missing after a key"),
        (b"1 2", "the line is not valid JSON: something follows the value"),
        (b'["abc]', "the line is not valid JSON: a string has no end"),
        (b'["a\nb"]', "the line is not valid JSON: a control character in a string is not escaped"),
        (b'["\\x"]', "the line is not valid JSON: a backslash does not begin an escape"),
        (b'["\\u12"]', "the line is not valid JSON: an escape \\u needs four hexadecimal digits"),
        (
            b'{"a": %s, "b": x}' % (b"9" * 5000),
            "the line is not valid JSON: the word x is not in quotes",
        ),
        (b"[%s, NaN]" % (b"9" * 5000), "the line is not valid JSON: NaN is not a JSON number"),
        (b"[%s, %s" % (b"9" * 5000, b"[" * 100_000), "the line is nested too deeply"),
        (
            b"\xef\xbb\xbf\xef\xbb\xbf1",
            "the line is not valid JSON: a byte order mark is not allowed",
        ),
    ],
)
def test_invalid_json_is_refused_in_one_sentence_that_names_the_subject(raw, sentence):
    with pytest.raises(BadRequest) as refusal:
        parse_json(raw, subject="the line")
    assert str(refusal.value).startswith(sentence)
    assert not re.search("codec|Expecting|delimiter|utf-8-sig", str(refusal.value))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
)


@given(_JSON, st.booleans())
def test_a_value_is_read_as_python_reads_it(value, ascii_only):
    raw = json.dumps(value, ensure_ascii=ascii_only).replace("Infinity", "1e999")
    encoded = raw.encode("utf-8", "replace")
    assert repr(parse_json(encoded, subject="the body")) == repr(json.loads(encoded))


@given(
    st.from_regex(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?", fullmatch=True)
)
@example("9007199254740993.0")
@example("2.2250738585072011e-308")
@example("0.500000000000000166533453693773481063544750213623046875")
@example("-0")
@example("-0.0")
def test_a_number_is_read_to_the_same_bits_as_python_reads_it(text):
    assert repr(parse_json(text.encode(), subject="the body")) == repr(json.loads(text))


@given(
    st.sampled_from([b'{"a": [1, -2.5e3, true, null, "x\\u00e9"], "b": {}}', b"[0.1, 10]"]),
    st.integers(0, 60),
    st.binary(max_size=3),
)
def test_what_python_refuses_is_refused(raw, position, inserted):
    mutated = raw[:position] + inserted + raw[position + 1 :]
    try:
        expected = json.loads(mutated.decode(), parse_constant=lambda name: 1 / 0)
    except (ValueError, ZeroDivisionError):
        with pytest.raises(BadRequest):
            parse_json(mutated, subject="the body")
    else:
        assert repr(parse_json(mutated, subject="the body")) == repr(expected)


def test_half_an_emoji_is_json():
    assert parse_json(b'"\\ud83d"', subject="the body") == "\ud83d"


def test_values_are_shown_as_json_and_cut_where_they_get_long():
    assert [shown(value) for value in (None, True, "é", [1, {}])] == [
        "null",
        "true",
        '"\\u00e9"',
        "[1, {}]",
    ]
    assert shown("x" * 58) == '"' + "x" * 58 + '"'
    assert shown("x" * 59) == '"' + "x" * 59 + "..."
    assert shown([7] * 1000) == "[" + "7, " * 19 + "7, "[:2] + "..."
    assert [shown_flat(value) for value in ([1], {"a": 1}, "a")] == ["a list", "an object", '"a"']


def test_a_long_value_is_cut_and_a_deep_one_is_not_walked():
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown_flat(deep) == "a list"
    assert len(shown_flat("x" * 10**6)) < 70
    assert len(shown_flat(10**4000)) < 70
    # Unnest the list level by level: its deallocation would recurse just as deep.
    while deep:
        deep = deep.pop()  # type: ignore[assignment]


def test_a_value_that_is_too_deep_for_json_is_called_deeply_nested():
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "a deeply nested value"
    while deep:
        deep = deep.pop()  # type: ignore[assignment]


def test_one_byte_order_mark_is_ignored():
    assert parse_json(b"\xef\xbb\xbf[1]", subject="the body") == [1]


def test_the_longest_number_is_read_and_a_longer_one_is_named_by_its_field():
    assert parse_json(b"[%s]" % (b"9" * 4300), subject="the body") == [int("9" * 4300)]
    with pytest.raises(BadRequest) as refusal:
        parse_json(b'{"a": [1, {"b c": %s}]}' % (b"9" * 4301), subject="the body")
    assert refusal.value.field == 'a.1."b c"'
    assert "number of 4301 digits" in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("7", 7),
        ("0000000000005000", 5000),
        ("0" * 10_000 + "7", 7),
        ("9" * 10_000, 10**18),
        ("", None),
        ("-1", None),
        ("+1", None),
        ("1.0", None),
        ("1_0", None),
        (" 1", None),
        ("\u0663", None),
        ("\u00b2", None),
    ],
)
def test_a_whole_number_is_written_in_digits_alone(text, number):
    assert whole_number(text) == number


def test_a_key_is_shown_without_quotes_if_it_is_a_word():
    assert [shown_key(key) for key in ("top_k", "inputs.0", "x-y", "mérték")] == [
        "top_k",
        "inputs.0",
        "x-y",
        "mérték",
    ]
    assert [shown_key(key) for key in ("", "a b", "7", "\ud83d")] == [
        '""',
        '"a b"',
        '"7"',
        '"\\ud83d"',
    ]
    assert shown_key("x" * 61) == '"' + "x" * 59 + "..."


def test_a_long_number_of_a_key_that_occurs_again_is_ignored():
    assert parse_json(b'{"a": %s, "a": 1}' % (b"9" * 5000), subject="the body") == {"a": 1}
