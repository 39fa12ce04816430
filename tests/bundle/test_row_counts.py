"""With fakes of `run`: a row is three numbers, which each fake adds in another way."""

from __future__ import annotations

from itertools import count, pairwise

import numpy as np
import pytest

from evalmode.bundle.errors import ModelRunFailed
from evalmode.bundle.frontend import BpeSpec, NgramSpec
from evalmode.bundle.known_answers import bits
from evalmode.bundle.row_counts import (
    rows_by_length,
    stable_row_counts,
    stack,
    timed_row_counts,
)

ROWS = [{"x": np.array([[0.1, 0.2, 0.3 + position]], np.float32)} for position in range(3)]
COUNTS = (1, 2, 4, 8)


def exact(inputs):
    return {"y": inputs["x"].sum(1, keepdims=True)}


def test_a_run_without_batch_effects_is_stable_at_every_count():
    assert stable_row_counts(exact, ROWS, COUNTS) == COUNTS


@pytest.mark.parametrize("unstable", [{2}, {4, 8}, {2, 4, 8}])
def test_row_counts_with_other_bits_are_not_stable(unstable):
    def run(inputs):
        outputs = exact(inputs)["y"]
        return {"y": np.nextafter(outputs, np.float32(9)) if len(outputs) in unstable else outputs}

    assert stable_row_counts(run, ROWS, COUNTS) == tuple(
        row_count for row_count in COUNTS if row_count not in unstable
    )


@pytest.mark.parametrize("position", [0, 1, 3, 7])
def test_a_row_count_is_not_stable_if_one_position_of_the_batch_has_other_bits(position):
    def run(inputs):
        outputs = exact(inputs)["y"]
        if len(outputs) == 8:
            outputs[position] = np.nextafter(outputs[position], np.float32(9))
        return {"y": outputs}

    assert stable_row_counts(run, ROWS, COUNTS) == (1, 2, 4)


def test_a_run_in_which_rows_depend_on_their_neighbours_is_stable_at_one_row_only():
    def run(inputs):
        return {"y": exact(inputs)["y"] - inputs["x"].mean()}

    assert stable_row_counts(run, ROWS, COUNTS) == (1,)


def test_a_run_that_does_not_repeat_itself_is_stable_nowhere():
    noise = count()

    def run(inputs):
        return {"y": exact(inputs)["y"] + next(noise)}

    assert stable_row_counts(run, ROWS, COUNTS) == ()


def test_the_sign_of_a_zero_counts_as_a_bit():
    def run(inputs):
        return {
            "y": np.zeros((len(inputs["x"]), 1), np.float32) * (1 if len(inputs["x"]) == 1 else -1)
        }

    assert stable_row_counts(run, ROWS, COUNTS) == (1,)


def test_every_output_is_compared():
    def run(inputs):
        rows = len(inputs["x"])
        return {"y": exact(inputs)["y"], "z": np.full((rows, 1), rows if rows > 2 else 0)}

    assert stable_row_counts(run, ROWS, COUNTS) == (1, 2)


def test_a_row_count_not_begun_within_the_budget_is_left_out():
    assert set(timed_row_counts(exact, ROWS, COUNTS, budget_s=0)) == {1}


def test_row_counts_that_are_well_timed_run_only_to_compare_their_bits():
    batches = []

    def run(inputs):
        batches.append(len(inputs["x"]))
        return exact(inputs)

    timed = timed_row_counts(run, ROWS, COUNTS, budget_s=10, well_timed={1, 2, 4})
    assert set(timed) == set(COUNTS)
    # Two batches of each count show its stability, and four more runs improve the time of the last.
    assert [batches.count(count) for count in COUNTS] == [len(ROWS) + 2, 2, 2, 6]


def test_exactly_the_stable_row_counts_are_timed():
    def run(inputs):
        outputs = exact(inputs)["y"]
        return {"y": np.nextafter(outputs, np.float32(9)) if len(outputs) == 4 else outputs}

    timed = timed_row_counts(run, ROWS, COUNTS, budget_s=10)
    assert set(timed) == {1, 2, 8}
    assert all(seconds > 0 for seconds in timed.values())


def test_a_batch_that_fails_ends_the_measurement_without_an_error():
    def run(inputs):
        if len(inputs["x"]) > 2:
            raise ModelRunFailed("out of memory")
        return exact(inputs)

    assert set(timed_row_counts(run, ROWS, COUNTS, budget_s=10)) == {1, 2}


def test_a_single_row_that_fails_is_an_error():
    def run(inputs):
        raise ModelRunFailed("always")

    with pytest.raises(ModelRunFailed):
        timed_row_counts(run, ROWS, COUNTS, budget_s=10)


def test_a_batch_with_fewer_output_rows_is_not_stable():
    def run(inputs):
        return {"y": exact(inputs)["y"][:2]}

    assert stable_row_counts(run, ROWS, COUNTS) == (1, 2)


def test_strings_are_compared_by_content_and_not_by_address():
    first, second = np.array(["ab", "c"], object), np.array(["a", "bc"], object)
    assert bits(first) == bits(np.array(["".join("ab"), "c"], object))
    assert bits(first) != bits(second)


LADDER = NgramSpec(lengths=(4, 8, 32))


def rows_of(*lengths):
    """Rows (T, 2) of these lengths, with different ids everywhere."""
    starts = np.cumsum([0, *lengths])
    return [np.arange(2 * a, 2 * b, dtype=np.int64).reshape(-1, 2) + 1 for a, b in pairwise(starts)]


def real_length(row):
    return int(row["input_ids"][0].any(-1).sum())


def test_every_length_has_single_rows_half_of_them_full_and_half_mostly_padding():
    rows_at = rows_by_length(rows_of(1, 3, 4, 5, 8, 9, 20, 32), LADDER)
    assert list(rows_at) == [4, 8, 32]
    for length, rows in rows_at.items():
        assert {row["input_ids"].shape for row in rows} == {(1, length, 2)}
        real = [real_length(row) for row in rows]
        assert real[0::2] == [length] * 4
        assert all(1 <= short <= length // 2 for short in real[1::2])
        assert len({row["input_ids"].tobytes() for row in rows}) == 8, "eight rows that differ"


def test_texts_are_joined_to_reach_a_length_that_none_of_them_has():
    short = rows_of(1, 2)
    rows_at = rows_by_length(short, NgramSpec(lengths=(3, 8)), each=2)
    assert [real_length(rows[0]) for rows in rows_at.values()] == [3, 8]
    assert [len(rows) for rows in rows_at.values()] == [2, 2]


@pytest.mark.parametrize("length", [16, 2, 1])
def test_rows_fit_a_ladder_of_one_length(length):
    rows = rows_by_length(rows_of(1, 3, 9), NgramSpec(lengths=(length,)))[length]
    assert {row["input_ids"].shape[:2] for row in rows} == {(1, length)}


def test_rows_of_token_ids_come_with_their_attention_mask():
    (rows,) = rows_by_length([np.arange(1, 9)], BpeSpec(vocabulary=99, lengths=(8,))).values()
    for row in rows:
        np.testing.assert_array_equal(row["attention_mask"], row["input_ids"] != 0)


def test_a_batch_takes_its_rows_in_turn():
    rows = [{"x": np.array([[position]])} for position in range(3)]
    assert stack(rows, count=5, first=1)["x"].tolist() == [[1], [2], [0], [1], [2]]
