"""Texts of no class: how many there are, and that they never contradict a label."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evalmode.model.data_set import DataSet, Texts
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


def has_letters(text: str) -> bool:
    return any(character.isalpha() for character in text)


@pytest.mark.parametrize(("rows", "count"), [(9, 512), (400, 512), (30_000, 600)])
def test_a_fiftieth_of_the_training_rows_and_at_least_512_are_made_without_letters(rows, count):
    texts = with_unlabelled(data_set([f"text {number}" for number in range(rows)])).unlabelled
    assert len(texts) == count
    assert not any(has_letters(text) for text in texts)


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (100, 100), (5_000, 128)])
def test_validation_has_others_of_them_as_many_as_rows_and_at_most_128(rows, count):
    data = replace(data_set(["a text"]), validation=Texts(("a text",) * rows, ("x",) * rows))
    texts = with_unlabelled(data).unlabelled_validation
    assert len(texts) == count
    assert not any(has_letters(text) for text in texts)


def test_a_data_set_that_brings_its_own_stays_as_it_is():
    data = data_set(["a text"] * 500, unlabelled=("12:30",))
    assert with_unlabelled(data) is data


def test_none_is_made_where_texts_without_letters_are_what_is_classified():
    texts = [f"text {number}" for number in range(90)]
    assert with_unlabelled(data_set([*texts, *["?!"] * 10])).unlabelled
    assert with_unlabelled(data_set([*texts, *["?!"] * 11])).unlabelled == ()


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_none_shares_a_character_with_a_labelled_text_without_letters(part):
    made = with_unlabelled(data_set(["a text"] * 500)).unlabelled
    assert {"?", "😀"} <= set("".join(made))
    assert any(character.isdigit() for text in made for character in text)

    labelled = Texts(("a text",) * 50 + ("?", "😀 ", "57"), ("x",) * 53)
    data = with_unlabelled(replace(data_set(["a text"] * 50), **{part: labelled}))
    for texts in (data.unlabelled, data.unlabelled_validation):
        assert texts
        assert not set("".join(texts)) & set("?😀0123456789")


def test_the_same_data_has_the_same_ones_and_they_are_part_of_its_digest():
    data = data_set(["a text"] * 500)
    made = with_unlabelled(data)
    assert with_unlabelled(data) == made
    digests = {data.sha256, made.sha256, replace(made, unlabelled_validation=()).sha256}
    assert len(digests) == 3
