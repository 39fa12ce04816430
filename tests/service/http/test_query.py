"""Queries: what they ask, and the sentence for each that is wrong."""

from __future__ import annotations

import pytest

from evalmode.service.errors import InvalidField
from evalmode.service.http.query import PredictQuery, parse_predict_query


def test_a_query_asks_what_it_says():
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
        ([("top_k", "1"), ("top_k", "1")], "top_k", "top_k stands twice in the query"),
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
