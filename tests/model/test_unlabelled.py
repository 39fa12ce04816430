"""Texts of no class: how many there are, and that they never contradict a label."""

from __future__ import annotations

import pytest

from evalmode.model.data import DataSet
from evalmode.model.texts import Texts
from evalmode.model.unlabelled import with_unlabelled


def data_set(texts: list[str], *, unlabelled: tuple[str, ...] = ()) -> DataSet:
    part = Texts(("a text",), ("x",))
    train = Texts(tuple(texts), ("x",) * len(texts))
    return DataSet(
        name="made up",
        labels=("x", "y"),
        train=train,
        validation=part,
        test=part,
        unlabelled=unlabelled,
    )


@pytest.mark.parametrize(("rows", "count"), [(49, 0), (50, 1), (400, 8), (5_000, 100)])
def test_a_fiftieth_of_the_training_rows_is_made_without_letters(rows, count):
    texts = with_unlabelled(data_set([f"text {number}" for number in range(rows)])).unlabelled
    assert len(texts) == count
    assert not any(character.isalpha() for text in texts for character in text)


def test_a_data_set_that_brings_its_own_stays_as_it_is():
    data = data_set(["a text"] * 500, unlabelled=("12:30",))
    assert with_unlabelled(data) is data


def test_labelled_texts_without_letters_take_the_place_of_those_that_would_be_made():
    texts = [f"text {number}" for number in range(5_000)]
    some, many = texts + ["?!"] * 40, texts + ["*****"] * 200
    assert len(with_unlabelled(data_set(some)).unlabelled) == pytest.approx(60, abs=3)
    assert with_unlabelled(data_set(many)).unlabelled == ()


def test_none_says_the_same_as_a_labelled_text():
    made = with_unlabelled(data_set(["a text"] * 20_000)).unlabelled
    assert {"?", "😀"} <= set(made)
    assert any(text[0].isdigit() and text.endswith("%") for text in made)
    labelled = ["?", "😀", "57 %"]
    beside = with_unlabelled(data_set(["a text"] * 20_000 + labelled)).unlabelled
    assert not set(beside) & {"?", "😀"}
    assert not any(len(text) == 4 and text.endswith(" %") for text in beside)


def test_the_same_data_has_the_same_ones_and_they_are_part_of_its_digest():
    data = data_set(["a text"] * 500)
    assert with_unlabelled(data) == with_unlabelled(data)
    assert with_unlabelled(data).sha256 != data.sha256
