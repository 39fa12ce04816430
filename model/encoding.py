"""The three parts of a data set as rows of ids, and no row that the front end reads like another.

Texts without a label are the last rows of the training and validation parts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evalmode.bundle.frontend import FrontEnd
from evalmode.model.batches import UNLABELLED, Rows, encode, rows_of
from evalmode.model.data import distinct_texts
from evalmode.model.data_set import DataSet


def encode_parts(data: DataSet, frontend: FrontEnd) -> dict[str, Rows]:
    """The rows of each part by its name: train, validation, test."""
    return {
        name: encode(_texts(data, name), _label_indices(data, name), frontend=frontend)
        for name in data.parts
    }


def drop_duplicates(data: DataSet, parts: dict[str, Rows]) -> tuple[DataSet, dict[str, Rows]]:
    """The data and its rows without the texts that have the ids of another text.

    parts: the rows of `data`, as `encode_parts` returns them. See `distinct_texts` for the texts
    that stay. Nothing is encoded again.
    """
    keys = {}
    for name, part in data.parts.items():
        keys[name] = [parts[name].ids(index).tobytes() for index in range(len(part.texts))]
    distinct = distinct_texts(data, keys)
    if distinct is data:
        return data, parts

    # A row may be in another part now: when a label loses its training rows, its other rows move.
    ids_of_text: dict[str, npt.NDArray[np.int32]] = {}
    for name in data.parts:
        for index, text in enumerate(_texts(data, name)):
            ids_of_text[text] = parts[name].ids(index)
    distinct_parts = {}
    for name in distinct.parts:
        ids = [ids_of_text[text] for text in _texts(distinct, name)]
        distinct_parts[name] = rows_of(ids, _label_indices(distinct, name))
    return distinct, distinct_parts


def _unlabelled(data: DataSet, name: str) -> tuple[str, ...]:
    return {"train": data.unlabelled, "validation": data.unlabelled_validation, "test": ()}[name]


def _texts(data: DataSet, name: str) -> tuple[str, ...]:
    return data.parts[name].texts + _unlabelled(data, name)


def _label_indices(data: DataSet, name: str) -> list[int]:
    index_of = {label: index for index, label in enumerate(data.labels)}
    indices = [index_of[label] for label in data.parts[name].labels]
    return indices + [UNLABELLED] * len(_unlabelled(data, name))
