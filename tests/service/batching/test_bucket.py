"""How many rows a batch should have, by the measured costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.service.batching.engine_fakes import bucket_of


def test_a_batch_has_the_size_with_the_lowest_cost_per_row():
    bucket = bucket_of(costs={1: 1.0, 2: 1.2, 4: 2.0, 8: 8.0})
    assert [bucket.best_size(rows) for rows in (1, 2, 3, 4, 5, 8, 100)] == [1, 2, 2, 4, 4, 4, 4]


def test_a_batch_is_filled_with_copies_if_that_costs_less_than_two_batches():
    bucket = bucket_of(costs={1: 1.0, 8: 2.0})
    assert [bucket.best_size(rows) for rows in (1, 2, 3, 8)] == [1, 1, 8, 8]


def test_at_equal_costs_a_batch_has_few_copies_and_many_rows():
    bucket = bucket_of(costs={1: 1.0, 2: 2.0, 4: 4.0, 8: 4.0})
    assert [bucket.best_size(rows) for rows in (1, 3, 4)] == [1, 2, 4]


@given(st.dictionaries(st.integers(1, 64), st.floats(0.001, 10), min_size=1), st.integers(1, 200))
def test_no_allowed_size_is_cheaper_per_row(costs, rows):
    bucket = bucket_of(costs=costs)
    size = bucket.best_size(rows)
    assert all(
        costs[size] / min(size, rows) <= cost / min(count, rows) for count, cost in costs.items()
    )
    if rows <= max(costs):
        assert bucket.cheapest_size(rows) >= rows


@pytest.mark.parametrize("costs", [{0: 1.0}, {1: float("nan")}, {2: -1.0}])
def test_invalid_costs_are_refused_by_name(costs):
    with pytest.raises(ValueError, match="costs of bucket m/1/8"):
        bucket_of(costs=costs)
