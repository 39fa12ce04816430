"""Encoded rows, and the order in which they are read: batches that are a pure function of (seed,
epoch).

Nothing here remembers a random state. Which rows share a batch, and where each is cropped, follow
from the seed, the epoch and the row's number alone: a run that was killed reads on as though it
never had been.

Shapes: N rows, B rows a batch, T positions, G ids a position. Knows nothing of texts, labels' names
or the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evalmode.bundle.frontend import BpeSpec, FrontEnd, FrontEndSpec, Ids, collate

# input_ids, attention_mask where the front end needs one, and labels (B,) int64
Batch = dict[str, Tensor]
UNLABELLED = -1


@dataclass(frozen=True, kw_only=True)
class Rows:
    """N encoded texts, end to end in one array.

    flat (sum of T,) or (sum of T, G) int32, offsets (N + 1,) int64, labels (N,) int64: -1 where a
    text has no label.
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
        """The ids of one row as they are held, without a copy."""
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    @property
    def labelled(self) -> Rows:
        """The rows that have a label, in their order."""
        numbers = np.flatnonzero(self.labels != UNLABELLED)
        return self if len(numbers) == len(self) else self.take(numbers)

    def take(self, numbers: npt.NDArray[np.int64]) -> Rows:
        """These rows alone, in this order."""
        return joined([self.ids(number) for number in numbers], self.labels[numbers])

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """T of each row, (N,)."""
        return np.diff(self.offsets)


def encode(texts: Iterable[str], labels: Sequence[int], *, frontend: FrontEnd) -> Rows:
    """The rows of texts. int32 in memory: training holds all of them at once, and no id needs
    more.
    """
    return joined([frontend.encode(text).ids.astype(np.int32) for text in texts], labels)


def joined(
    rows: Sequence[npt.NDArray[np.int32]], labels: Sequence[int] | npt.NDArray[np.int64]
) -> Rows:
    """The rows of texts that are encoded already."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Rows(flat=np.concatenate(rows), offsets=offsets, labels=np.asarray(labels, np.int64))


def plan(
    lengths: npt.NDArray[np.int64], *, batch_rows: int, draw: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    """Row numbers, batch by batch: every row once, neighbours in length together, batches in a
    drawn order.

    Each batch but one is full: where the rows of one length run out, those of the next fill it.
    """
    shuffled = draw.permutation(len(lengths))
    shuffled = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    batches = [
        shuffled[start : start + batch_rows] for start in range(0, len(shuffled), batch_rows)
    ]
    return [batches[index] for index in draw.permutation(len(batches))]


def padded(rows: Sequence[Ids], labels: npt.NDArray[np.int64], *, length: int) -> Batch:
    """Rows and their labels as tensors, padded to `length`."""
    batch = {name: torch.from_numpy(array) for name, array in collate(rows, length=length).items()}
    return batch | {"labels": torch.from_numpy(labels)}


class Batches:
    """An endless shelf of training epochs, read one epoch an `iter`; knows how many batches were
    taken from it.

    With several processes each takes every `world`-th batch of the same order, from its `rank` on,
    and all take equally many: what is left over waits for the next epoch's order.
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
        self.rows, self.spec, self.batch_rows, self.seed, self.crop = (
            rows,
            spec,
            batch_rows,
            seed,
            crop,
        )
        self.rank, self.world, self.taken = rank, world, 0

    def __len__(self) -> int:
        """Batches an epoch for one process."""
        return -(-len(self.rows) // self.batch_rows) // self.world

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch that the next batch belongs to."""
        epoch, done = divmod(self.taken, len(self))
        order = plan(
            self.rows.lengths,
            batch_rows=self.batch_rows,
            draw=np.random.default_rng((self.seed, epoch)),
        )
        for numbers in order[self.rank :: self.world][done : len(self)]:
            self.taken += 1
            rows = [
                self._cropped(self.rows[number], epoch=epoch, number=number) for number in numbers
            ]
            # To the longest of the batch, not to the ladder's next rung as in service: a quarter
            # less to compute.
            yield padded(rows, self.rows.labels[numbers], length=max(len(row) for row in rows))

    def state_dict(self) -> dict[str, int]:
        """Where it stands: batches this process has taken since the first epoch; the same in every
        process.
        """
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Stand where `state` was taken: the batches before it are never made again."""
        self.taken = state["taken"]

    def _cropped(self, ids: Ids, *, epoch: int, number: int) -> Ids:
        if self.crop == 0.0:
            return ids
        draw = np.random.default_rng((self.seed, epoch, int(number)))
        return crop(ids, spec=self.spec, draw=draw) if draw.random() < self.crop else ids


def crop(ids: Ids, *, spec: FrontEndSpec, draw: np.random.Generator) -> Ids:
    """A contiguous piece, at least half as long, of a row: of its characters, or of its BPE tokens
    after the first.
    """
    if isinstance(spec, BpeSpec):
        return np.concatenate([ids[:1], _piece(ids[1:], draw)])
    characters = ids.reshape(-1, spec.orders)
    characters = _piece(characters[characters[:, 0] != 0], draw)
    return np.pad(characters, ((0, -len(characters) % spec.characters), (0, 0))).reshape(
        -1, ids.shape[1]
    )


def _piece(ids: Ids, draw: np.random.Generator) -> Ids:
    length = int(draw.integers((len(ids) + 1) // 2, len(ids) + 1))
    start = int(draw.integers(0, len(ids) - length + 1))
    return ids[start : start + length]
