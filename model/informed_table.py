"""A first guess for the embedding table: the evidence that each id gives for each label.

With it the network starts about where a naive Bayes classifier ends.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evalmode.model.batches import UNLABELLED, Rows

# Pseudo-count s of every id, spread evenly over the labels.
SMOOTHING = 0.5


def label_evidence(rows: Rows, *, vocabulary: int, labels: int) -> npt.NDArray[np.float64]:
    """Centred log p(label | id), (vocabulary, labels): how much an id speaks for each label, on
    average 0.

        p(c | i) = (n(i, c) + s / C) / (n(i) + s)
        e(i, c) = log p(c | i) - mean over c' of log p(c' | i)

    with n(i, c) the times id i stands in rows of label c, divided by how many ids those rows have,
    so that a label with longer texts does not speak louder; s = SMOOTHING and C labels. An id never
    seen, and padding, has e = 0.
    """
    ids_a_row = np.diff(rows.offsets) * (rows.flat[0].size if len(rows.flat) else 1)
    label_of_id = np.repeat(rows.labels, ids_a_row)
    ids = rows.flat.reshape(-1).astype(np.int64)
    counted = (label_of_id != UNLABELLED) & (ids != 0)
    pairs = ids[counted] * labels + label_of_id[counted]
    counts = (
        np.bincount(pairs, minlength=vocabulary * labels)
        .reshape(vocabulary, labels)
        .astype(np.float64)
    )
    size = counts.sum(0)
    counts *= size.mean() / np.maximum(size, 1.0)
    evidence = np.log(counts + SMOOTHING / labels)  # log p, up to a constant that centring removes
    return evidence - evidence.mean(1, keepdims=True)


def label_evidence_table(
    rows: Rows, *, vocabulary: int, labels: int, width: int, scale: float, seed: int
) -> Tensor:
    """A table (vocabulary, width) float32 that holds a random rotation of `label_evidence`.

        table = scale * e @ R / std(e),   R (labels, width)

    The rows of R are orthonormal where labels <= width (the evidence is turned, none is lost);
    otherwise R is a Gaussian projection with variance 1 / width, which keeps distances on average
    (Johnson and Lindenstrauss 1984).
    """
    evidence = label_evidence(rows, vocabulary=vocabulary, labels=labels)
    draw = np.random.default_rng((seed, labels, width))
    if labels <= width:
        turn = np.linalg.qr(draw.standard_normal((width, labels)))[0].T
    else:
        turn = draw.standard_normal((labels, width)) / np.sqrt(width)
    spread = evidence[evidence.any(1)].std() if evidence.any() else 1.0
    return torch.from_numpy((evidence @ turn * (scale / spread)).astype(np.float32))
