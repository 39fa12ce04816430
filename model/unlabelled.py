"""Texts of no class, made for a data set without them.

A network learns from them to give every class the same score for a text without letters.
"""

from __future__ import annotations

import re
from dataclasses import replace

from evalmode.model.data_set import DataSet
from evalmode.model.languages import letterless

# Texts without letters for training: one for so many training rows, and at least MIN_TEXTS. Fewer
# are learned by heart, and teach nothing about the next one.
ROWS_PER_TEXT = 50
MIN_TEXTS = 512
# Other such texts show in validation whether that was learned: as many as there are validation
# rows, which they must not outvote, and at most these.
MAX_VALIDATION_TEXTS = 128
# If more of the training rows have no letters, then such texts are what the model classifies.
MAX_LETTERLESS_SHARE = 0.1

_LETTER = re.compile(r"[^\W\d_]")


def with_unlabelled(data: DataSet) -> DataSet:
    """`data` with texts without letters for training and validation.

    Texts without letters that have a label keep it. A new text that shares a character with one of
    them is dropped, so that nothing contradicts a label; all digits count as one character.

    Returns `data` itself if it has unlabelled texts, or if MAX_LETTERLESS_SHARE is exceeded.
    """
    if data.unlabelled:
        return data
    letterless_rows = 0
    labelled_characters: set[str] = set()
    for name, part in data.parts.items():
        for text in part.texts:
            if _LETTER.search(text) is None:
                letterless_rows += name == "train"
                labelled_characters |= _characters(text)
    train_rows = len(data.train.texts)
    if letterless_rows > MAX_LETTERLESS_SHARE * train_rows:
        return data

    def new_texts(count: int, seed: int) -> tuple[str, ...]:
        texts = letterless(count, seed=seed)
        return tuple(text for text in texts if not labelled_characters & _characters(text))

    # Other seeds, so that validation has other texts than training.
    return replace(
        data,
        unlabelled=new_texts(max(MIN_TEXTS, train_rows // ROWS_PER_TEXT), seed=0),
        unlabelled_validation=new_texts(
            min(MAX_VALIDATION_TEXTS, len(data.validation.texts)), seed=1
        ),
    )


def _characters(text: str) -> set[str]:
    """The characters of a text without its blanks; "0" stands for all digits."""
    return {
        "0" if character.isdecimal() else character
        for character in set(text)
        if not character.isspace()
    }
