"""Fake runs: a row is three numbers, and how they are added depends on what the fake is to show."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from evalmode.bundle.row_counts import stable_row_counts, stack

ROWS = [{"x": np.array([[0.1, 0.2, 0.3 + place]], np.float32)} for place in range(3)]
COUNTS = (1, 2, 4, 8)


def exact(inputs):
    return {"y": inputs["x"].sum(1, keepdims=True)}


def test_a_run_without_batch_effects_is_stable_at_every_count():
    assert stable_row_counts(exact, ROWS, COUNTS) == COUNTS


@pytest.mark.parametrize("unstable", [{2}, {4, 8}, {2, 4, 8}])
def test_a_run_that_depends_on_the_row_count_is_found(unstable):
    def run(inputs):
        found = exact(inputs)["y"]
        return {"y": np.nextafter(found, np.float32(9)) if len(found) in unstable else found}

    assert stable_row_counts(run, ROWS, COUNTS) == tuple(each for each in COUNTS if each not in unstable)


@pytest.mark.parametrize("place", [0, 1, 3, 7])
def test_one_place_of_the_batch_that_has_other_bits_is_found(place):
    def run(inputs):
        found = exact(inputs)["y"]
        if len(found) == 8:
            found[place] = np.nextafter(found[place], np.float32(9))
        return {"y": found}

    assert stable_row_counts(run, ROWS, COUNTS) == (1, 2, 4)


def test_a_run_in_which_rows_see_their_neighbours_is_found():
    def run(inputs):
        return {"y": exact(inputs)["y"] - inputs["x"].mean()}

    assert stable_row_counts(run, ROWS, COUNTS) == (1,)


def test_a_run_that_does_not_repeat_itself_is_stable_nowhere():
    noise = count()

    def run(inputs):
        return {"y": exact(inputs)["y"] + next(noise)}

    assert stable_row_counts(run, ROWS, COUNTS) == ()


def test_the_sign_of_a_zero_is_a_bit_too():
    def run(inputs):
        return {"y": np.zeros((len(inputs["x"]), 1), np.float32) * (1 if len(inputs["x"]) == 1 else -1)}

    assert stable_row_counts(run, ROWS, COUNTS) == (1,)


def test_every_output_counts():
    def run(inputs):
        rows = len(inputs["x"])
        return {"y": exact(inputs)["y"], "z": np.full((rows, 1), rows if rows > 2 else 0)}

    assert stable_row_counts(run, ROWS, COUNTS) == (1, 2)


def test_what_is_not_begun_in_time_is_not_proven():
    assert stable_row_counts(exact, ROWS, COUNTS, budget_s=0) == (1,)


def test_a_batch_takes_its_rows_in_turn():
    rows = [{"x": np.array([[place]])} for place in range(3)]
    assert stack(rows, count=5, first=1)["x"].tolist() == [[1], [2], [0], [1], [2]]
