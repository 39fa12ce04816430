"""Texts without a class: their number, and that they never contradict a label."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evalmode.model.data_set import DataSet, Texts
from evalmode.model.unlabelled import with_unlabelled


def data_set(texts: list[str], *, unlabelled: tuple[str, ...] = ()) -> DataSet:
    part = Texts(("a text",), ("x",))
    train = Texts(tuple(texts), ("x",) * len(texts))
    return DataSet(
        name="invented",
        labels=("x", "y"),
        train=train,
        validation=part,
        test=part,
        unlabelled=unlabelled,
    )


def has_letters(text: str) -> bool:
    return any(character.isalpha() for character in text)


@pytest.mark.parametrize(("rows", "count"), [(9, 512), (400, 512), (30_000, 600)])
def test_train_gets_a_fiftieth_of_its_rows_in_texts_without_letters_and_at_least_512(rows, count):
    texts = with_unlabelled(data_set([f"text {number}" for number in range(rows)])).unlabelled
    assert len(texts) == count
    assert not any(has_letters(text) for text in texts)


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (100, 100), (5_000, 128)])
def test_validation_gets_as_many_texts_without_letters_as_rows_and_at_most_128(rows, count):
    data = replace(data_set(["a text"]), validation=Texts(("a text",) * rows, ("x",) * rows))
    texts = with_unlabelled(data).unlabelled_validation
    assert len(texts) == count
    assert not any(has_letters(text) for text in texts)


def test_a_data_set_with_unlabelled_texts_is_unchanged():
    data = data_set(["a text"] * 500, unlabelled=("12:30",))
    assert with_unlabelled(data) is data


def test_no_text_is_added_if_more_than_a_tenth_of_the_texts_has_no_letters():
    texts = [f"text {number}" for number in range(90)]
    assert with_unlabelled(data_set([*texts, *["?!"] * 10])).unlabelled
    assert with_unlabelled(data_set([*texts, *["?!"] * 11])).unlabelled == ()


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_no_added_text_shares_a_character_with_a_labelled_text_without_letters(part):
    unlabelled = with_unlabelled(data_set(["a text"] * 500)).unlabelled
    assert {"?", "😀"} <= set("".join(unlabelled))
    assert any(character.isdigit() for text in unlabelled for character in text)

    labelled = Texts(("a text",) * 50 + ("?", "😀 ", "57"), ("x",) * 53)
    data = with_unlabelled(replace(data_set(["a text"] * 50), **{part: labelled}))
    for texts in (data.unlabelled, data.unlabelled_validation):
        assert texts
        assert not set("".join(texts)) & set("?😀0123456789")


def test_equal_data_gets_equal_texts_which_are_part_of_its_digest():
    data = data_set(["a text"] * 500)
    extended = with_unlabelled(data)
    assert with_unlabelled(data) == extended
    digests = {data.sha256, extended.sha256, replace(extended, unlabelled_validation=()).sha256}
    assert len(digests) == 3
