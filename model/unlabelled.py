"""Texts that belong to no class, made for a data set that has none: a network learns to give every
class the same score for them.
"""

from __future__ import annotations

import re
from dataclasses import replace

from evalmode.model.data import DataSet
from evalmode.model.languages import letterless

# One for so many training rows.
ROWS_A_TEXT = 50
_LETTER = re.compile(r"[^\W\d_]")


def with_unlabelled(data: DataSet) -> DataSet:
    """The data set with texts without letters, one for each ROWS_A_TEXT training rows.

    Texts without letters that have a label keep it, and each takes the place of one that would be
    made: where they are many, as ratings and dates are, none contradicts them. None that is made
    says the same as a labelled one. A data set that brings its unlabelled texts stays as it is.
    """
    if data.unlabelled:
        return data
    parts = (data.train, data.validation, data.test)
    labelled = {_shape(text) for part in parts for text in part.texts if not _LETTER.search(text)}
    of_class = sum(not _LETTER.search(text) for text in data.train.texts)
    count = len(data.train.texts) // ROWS_A_TEXT - of_class
    texts = letterless(max(0, count), seed=0)
    return replace(data, unlabelled=tuple(text for text in texts if _shape(text) not in labelled))


def _shape(text: str) -> str:
    """A text without letters as front ends read it at most: single blanks, every digit alike."""
    return re.sub(r"\d", "0", " ".join(text.split()))
