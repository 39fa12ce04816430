"""Texts that belong to no class, made for a data set that has none: a network learns to give every
class the same score for them.
"""

from __future__ import annotations

import re
from dataclasses import replace

from evalmode.model.data import DataSet
from evalmode.model.languages import letterless

# Texts without letters that training gets: one for so many training rows, and at least FEWEST.
# Fewer are learned by heart, and teach nothing about the next one.
ROWS_A_TEXT, FEWEST = 50, 512
# Others like them, from which validation sees whether that was learned: as many as there are
# validation rows, which they must not outvote, and at most so many.
MOST_VALIDATION = 128
# Where so large a share of the training rows has no letters, such texts are what is classified.
MOST_LABELLED = 0.1

_LETTER = re.compile(r"[^\W\d_]")


def with_unlabelled(data: DataSet) -> DataSet:
    """Add texts without letters to the training and validation rows.

    Texts without letters that have a label keep it. Made-up texts that share a character with one
    of them are dropped (digits count as one character), so nothing contradicts a label. A data set
    that brings unlabelled texts of its own stays as it is.
    """
    if data.unlabelled:
        return data
    parts = (data.train, data.validation, data.test)
    characters = {
        character
        for part in parts
        for text in part.texts
        if not _LETTER.search(text)
        for character in _characters(text)
    }
    rows = len(data.train.texts)
    labelled = sum(not _LETTER.search(text) for text in data.train.texts)
    if labelled > MOST_LABELLED * rows:
        return data
    train, validation = (
        tuple(text for text in letterless(count, seed=seed) if not characters & _characters(text))
        for count, seed in (
            (max(FEWEST, rows // ROWS_A_TEXT), 0),
            (min(MOST_VALIDATION, len(data.validation.texts)), 1),
        )
    )
    return replace(data, unlabelled=train, unlabelled_validation=validation)


def _characters(text: str) -> set[str]:
    """The characters of a text but for blanks; one stands for all digits."""
    return {
        "0" if character.isdecimal() else character
        for character in set(text)
        if not character.isspace()
    }
