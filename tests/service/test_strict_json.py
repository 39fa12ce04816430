from __future__ import annotations

import pytest

from evalmode.service.errors import BadRequest
from evalmode.service.strict_json import parse_json, shown, shown_flat


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"[" * 100_000, "the line is nested too deeply"),
        (b"NaN", "the line is not valid JSON: NaN is no JSON number"),
        (b"-Infinity", "the line is not valid JSON: -Infinity is no JSON number"),
        (b"\xff", "the line is not valid JSON: 'utf-8' codec"),
        (b"{", "the line is not valid JSON: Expecting"),
    ],
)
def test_what_is_not_json_is_refused_in_one_sentence_that_names_the_subject(raw, sentence):
    with pytest.raises(BadRequest) as refusal:
        parse_json(raw, subject="the line")
    assert str(refusal.value).startswith(sentence)


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


def test_a_long_value_is_cut_and_a_deep_one_is_not_walked_into():
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown_flat(deep) == "a list"
    assert len(shown_flat("x" * 10**6)) < 70
    assert len(shown_flat(10**4000)) < 70
    while deep:  # or its end would be as deep
        deep = deep.pop()  # type: ignore[assignment]
