"""The input and the output of a text classifier: rows of ids, and labels with their scores.

Shapes: B rows, T positions, G ids a position, C labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evalmode.bundle.errors import BundleError
from evalmode.bundle.frontend import BpeSpec, Ids, NgramSpec, collate
from evalmode.bundle.known_answers import Tensors
from evalmode.bundle.manifest import Manifest
from evalmode.service.errors import BadRequest, RunFailed
from evalmode.service.models.scores import ranking, softmax

# The names of the tensors of a text classifier.
LOGITS = "logits"
IDS = "input_ids"
MASK = "attention_mask"


class ScoredLabel(NamedTuple):
    """A label with its probability."""

    label: str
    score: float


class Prediction(NamedTuple):
    """The model's answer for one text.

    Attributes:
        top: the best labels, best first.
        truncated: whether the text was cut to the length that the model reads.
    """

    top: tuple[ScoredLabel, ...]
    truncated: bool

    @property
    def label(self) -> str:
        """The best label."""
        return self.top[0].label

    @property
    def score(self) -> float:
        """The best label's probability."""
        return self.top[0].score


class TextAnswer(dict[str, npt.NDArray[np.generic]]):
    """The outputs of one row by name, each with a leading dimension of 1.

    The scores of all rows of its batch are computed together, when one of them is asked for.
    """

    __slots__ = ("_batch", "_index")

    def __init__(self, outputs: Tensors, *, batch: BatchScores, index: int) -> None:
        super().__init__(outputs)
        self._batch = batch
        self._index = index

    def prediction(self, labels: Sequence[str], *, top_k: int, truncated: bool) -> Prediction:
        """The prediction with the `top_k` best of the labels, or all if there are fewer.

        Raises RunFailed if the logits of the row are not finite.
        """
        scores, ranked = self._batch.of(self._index)
        top = tuple([ScoredLabel(labels[label], scores[label]) for label in ranked[:top_k]])
        return Prediction(top, truncated)


class BatchScores:
    """The scores of logits (B, C), and the labels of each row from the best to the worst.

    `scores.py` computes each row by itself, so a row has the same bits in every batch. NumPy takes
    about as long for some rows as for one.
    """

    __slots__ = ("_logits", "_rows")

    def __init__(self, logits: npt.NDArray[np.generic]) -> None:
        self._logits = logits
        # None until the first use; then None for each row that is not finite.
        self._rows: list[tuple[list[float], list[int]] | None] | None = None

    def of(self, index: int) -> tuple[list[float], list[int]]:
        """The scores (C) of the row `index`, and its labels from the best to the worst (C).

        Raises RunFailed if the logits of this row are not finite.
        """
        if self._rows is None:
            logits = self._logits
            is_finite = np.isfinite(logits)
            without_scores: list[int] = []
            if not is_finite.all():
                has_scores = is_finite.all(axis=1)  # (B,)
                without_scores = np.flatnonzero(~has_scores).tolist()
                logits = np.where(has_scores[:, None], logits, 0)
            self._rows = list(zip(softmax(logits).tolist(), ranking(logits).tolist(), strict=True))
            for row_index in without_scores:
                self._rows[row_index] = None
        row = self._rows[index]
        if row is None:
            raise RunFailed(
                f"the model's output {LOGITS!r} holds numbers that are not finite for this text"
            )
        return row


@dataclass(slots=True, kw_only=True, eq=False)
class IdRow:
    """One row without padding.

    Attributes:
        ids: (T,) or (T, G).
        mask: which positions count, as 0 and 1, (T,); None for ids (T, G), and for a row whose
            positions all count.
    """

    ids: Ids
    mask: Ids | None = None

    def padded(self, length: int) -> dict[str, Ids]:
        """The model's inputs, padded to `length` positions: (1, length) or (1, length, G)."""
        inputs = collate([self.ids], length=length)
        if self.mask is not None:
            inputs[MASK][0, : len(self.mask)] = self.mask
        return inputs


def id_rows(inputs: Tensors, spec: NgramSpec | BpeSpec) -> Iterator[IdRow]:
    """The rows of raw ids (B, T) or (B, T, G), each cut to its own length. When they are padded
    again, they equal the rows of a text.

    A row ends at its last position that counts. These are the positions where attention_mask (B, T)
    is 1, or without a mask those with an id other than 0.

    Raises BadRequest, and names the first wrong value, for:

    1. ids of another shape, or with more positions than the model reads;
    2. ids outside the vocabulary;
    3. a mask of another shape, or with numbers other than 0 and 1;
    4. a row in which no position counts.
    """
    ids = inputs[IDS].astype(np.int64)
    gram_shape = (spec.ids_per_position,) if isinstance(spec, NgramSpec) else ()
    if ids.shape[2:] != gram_shape:
        raise BadRequest(
            f"{IDS} must have the shape {[-1, -1, *gram_shape]}, got {[*ids.shape]}", field=IDS
        )
    if ids.shape[1] > spec.lengths[-1]:
        raise BadRequest(
            f"{IDS} has {ids.shape[1]} positions and the model reads at most {spec.lengths[-1]}:"
            " shorten it",
            field=IDS,
        )
    _require_range(IDS, ids, below=spec.vocabulary)

    # Which positions count, as 0 and 1, (B, T).
    mask = inputs.get(MASK)
    if mask is None:
        is_id = ids != 0
        if ids.ndim == 3:
            is_id = is_id.any(-1)  # (B, T, G) -> (B, T)
        counts = np.asarray(is_id, np.int64)
    else:
        if mask.shape != ids.shape[:2]:
            raise BadRequest(
                f"{MASK} must have the shape {[*ids.shape[:2]]} of {IDS}, got {[*mask.shape]}",
                field=MASK,
            )
        counts = mask.astype(np.int64)
        _require_range(MASK, counts, below=2)

    lengths = (counts * np.arange(1, ids.shape[1] + 1)).max(axis=1, initial=0)  # (B,)
    for row, length in enumerate(lengths):
        if length == 0:
            name = MASK if MASK in inputs else IDS
            raise BadRequest(
                f"row {row} of {name} is empty: nothing in it counts, its answer would be NaN",
                field=name,
            )
        # Copies: a view would keep all rows of the request in memory.
        row_mask = None if gram_shape else counts[row, :length].copy()
        yield IdRow(ids=ids[row, :length].copy(), mask=row_mask)


def labels_of(manifest: Manifest, *, path: object) -> tuple[str, ...]:
    """The label of each logit; its number if the manifest has no labels.

    Raises BundleError if the model is not a classifier, or has another number of labels.
    """
    shape: tuple[int, ...] = ()
    for output in manifest.outputs:
        if output.name == LOGITS:
            shape = output.shape
    labels = manifest.labels
    if len(shape) != 2 or shape[1] < 1 or (labels is not None and len(labels) != shape[1]):
        classes = "labels" if labels is None else f"{len(labels)} labels"
        raise BundleError(
            f"{path} cannot be served as a text classifier: it needs an output {LOGITS!r} of shape"
            f" (batch, {classes}), the model has"
            f" {[(output.name, output.shape) for output in manifest.outputs]}"
        )
    return labels or tuple(map(str, range(shape[1])))


def _require_range(name: str, values: npt.NDArray[np.int64], *, below: int) -> None:
    """Raise BadRequest for the first value that is below 0, or not below `below`."""
    indices = np.argwhere((values < 0) | (values >= below))
    if len(indices):
        index = tuple(map(int, indices[0]))
        raise BadRequest(
            f"{name}{[*index]} must be at least 0 and below {below}, got {int(values[index])}",
            field=name,
        )
