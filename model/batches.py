"""Encoded rows, and their order in training: batches that depend on (seed, epoch) alone.

No random state is stored. The rows of a batch, and the crop of each row, follow from the seed, the
epoch and the index of the row. So a resumed run reads the same batches as an uninterrupted one.

Shapes: N rows, B rows a batch, T positions, G ids a position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evalmode.bundle.frontend import BpeSpec, FrontEnd, FrontEndSpec, Ids, collate

# input_ids, attention_mask if the front end needs one, and labels (B,) int64
Batch = dict[str, Tensor]
# The label index of a row without a label.
UNLABELLED = -1


@dataclass(frozen=True, kw_only=True)
class Rows:
    """N encoded texts, end to end in one array.

    flat        (sum of T,) or (sum of T, G) int32: the ids of all rows
    offsets     (N + 1,) int64: where each row starts in `flat`, and where the last one ends
    labels      (N,) int64: label indices, UNLABELLED for a row without a label
    """

    flat: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Ids:
        """The ids of one row, (T,) or (T, G) int64."""
        return self.ids(index).astype(np.int64)

    def ids(self, index: int) -> npt.NDArray[np.int32]:
        """The ids of one row, (T,) or (T, G) int32: a view of `flat`."""
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    @property
    def labelled(self) -> Rows:
        """The rows that have a label, in their order."""
        indices = np.flatnonzero(self.labels != UNLABELLED)
        return self if len(indices) == len(self) else self.take(indices)

    def take(self, indices: npt.NDArray[np.int64]) -> Rows:
        """The rows at these indices, in this order."""
        return rows_of([self.ids(index) for index in indices], self.labels[indices])

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The length T of each row, (N,)."""
        return np.diff(self.offsets)


def encode(texts: Iterable[str], labels: Sequence[int], *, frontend: FrontEnd) -> Rows:
    """The rows of texts."""
    # int32: training holds all rows in memory, and no id needs more.
    return rows_of([frontend.encode(text).ids.astype(np.int32) for text in texts], labels)


def rows_of(
    ids: Sequence[npt.NDArray[np.int32]], labels: Sequence[int] | npt.NDArray[np.int64]
) -> Rows:
    """The rows of texts that are already encoded: `ids` holds an array for each."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    return Rows(flat=np.concatenate(ids), offsets=offsets, labels=np.asarray(labels, np.int64))


def plan(
    lengths: npt.NDArray[np.int64], *, batch_rows: int, draw: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    """The row indices of each batch of one epoch: every row once, in a random order.

    Rows of similar length share a batch, which saves padding. Each batch but one is full.
    """
    shuffled = draw.permutation(len(lengths))
    # A stable sort leaves rows of one length in their shuffled order.
    by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    batches = [
        by_length[start : start + batch_rows] for start in range(0, len(by_length), batch_rows)
    ]
    return [batches[index] for index in draw.permutation(len(batches))]


def padded(rows: Sequence[Ids], labels: npt.NDArray[np.int64], *, length: int) -> Batch:
    """Rows and their labels as tensors, padded to `length`."""
    batch = {name: torch.from_numpy(array) for name, array in collate(rows, length=length).items()}
    return batch | {"labels": torch.from_numpy(labels)}


class Batches:
    """An endless sequence of training batches; each `iter` gives the rest of one epoch.

    It counts the batches that were read, and so knows where a resumed run goes on.

    All processes read the same order: each reads every `world`-th batch from its `rank` on, and all
    read equally many. The batches that are left over are not read in this epoch.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        spec: FrontEndSpec,
        batch_rows: int,
        seed: int,
        crop: float = 0.0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.rows = rows
        self.spec = spec
        self.batch_rows = batch_rows
        self.seed = seed
        self.crop = crop
        self.rank = rank
        self.world = world
        self.taken = 0  # batches that this process has read since the first epoch

    def __len__(self) -> int:
        """Batches of one epoch for one process."""
        batch_count = -(-len(self.rows) // self.batch_rows)
        return batch_count // self.world

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch that the next batch belongs to."""
        epoch, batches_read = divmod(self.taken, len(self))
        order = plan(
            self.rows.lengths,
            batch_rows=self.batch_rows,
            draw=np.random.default_rng((self.seed, epoch)),
        )
        for indices in order[self.rank :: self.world][batches_read : len(self)]:
            self.taken += 1
            rows = []
            for index in indices:
                ids = self.rows[index]
                if self.crop > 0.0:
                    draw = np.random.default_rng((self.seed, epoch, int(index)))
                    if draw.random() < self.crop:
                        ids = crop(ids, spec=self.spec, draw=draw)
                rows.append(ids)
            # Padded to the longest row of the batch. The ladder of the service would cost a third
            # more to compute, and a training needs no answers that are independent of neighbours.
            yield padded(rows, self.rows.labels[indices], length=max(len(row) for row in rows))

    def state_dict(self) -> dict[str, int]:
        """The number of batches that were read; the same in every process."""
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind the batches that were read when `state` was saved."""
        self.taken = state["taken"]


def crop(ids: Ids, *, spec: FrontEndSpec, draw: np.random.Generator) -> Ids:
    """A random contiguous piece of a row, at least half as long as the row.

    For n-grams it is a piece of the row's characters, (T, G) -> (T', G). For BPE it is a piece of
    the row's tokens, (T,) -> (T',), and the start token stays.
    """
    if isinstance(spec, BpeSpec):
        return np.concatenate([ids[:1], _piece(ids[1:], draw)])
    # A position of G ids is several characters with `orders` n-grams each. Character by character,
    # the padding has the id 0.
    characters = ids.reshape(-1, spec.orders)
    characters = _piece(characters[characters[:, 0] != 0], draw)
    padding = -len(characters) % spec.characters
    return np.pad(characters, ((0, padding), (0, 0))).reshape(-1, ids.shape[1])


def _piece(ids: Ids, draw: np.random.Generator) -> Ids:
    length = int(draw.integers((len(ids) + 1) // 2, len(ids) + 1))
    start = int(draw.integers(0, len(ids) - length + 1))
    return ids[start : start + length]
