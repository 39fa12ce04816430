"""Runs rows in batches on a pool of threads and answers them in order. Knows nothing of HTTP, tokens or ONNX.

It is given `run`, which answers rows of one key, and the batch sizes at which `run` gives every row the bits it has
alone. Rows of different keys never meet in a batch, and a batch never has another size.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from evalmode.service.errors import NotReady, RequestError, RunFailed

Row = TypeVar("Row")
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class _Batch(Generic[Answer]):
    """A batch on its way: the places of its rows in the request. `answers` may hold more: copies that filled it up."""

    places: Sequence[int]
    answers: Future[Sequence[Answer]]


class Engine(Generic[Row, Answer]):
    """Answers rows, blocking (`answer`) or awaited (`answer_async`), from any number of threads at once.

    A batch that fails fails the request it belongs to and nothing else; a request is answered whole or fails whole.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Row]], Sequence[Answer]],
        *,
        key: Callable[[Row], int],
        row_counts: Mapping[int, Sequence[int]],
        workers: int,
    ) -> None:
        assert all(row_counts.values()), "every key has a batch size that may run"
        self._run = run
        self._key = key
        self._row_counts = row_counts
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="engine")

    def answer(self, rows: Sequence[Row]) -> list[Answer]:
        """The answers of `rows`, in their order. Raises RunFailed when a batch fails, NotReady after `close`."""
        batches = self._start(rows)
        return self._collect(batches, [batch.answers.result() for batch in batches])

    async def answer_async(self, rows: Sequence[Row]) -> list[Answer]:
        """The same, without blocking the event loop."""
        batches = self._start(rows)
        answered = await asyncio.gather(*(asyncio.wrap_future(batch.answers) for batch in batches))
        return self._collect(batches, answered)

    def close(self) -> None:
        """Finish what was started and take nothing more."""
        self._pool.shutdown()

    def _start(self, rows: Sequence[Row]) -> list[_Batch[Answer]]:
        groups: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(self._key(row), []).append(place)
        batches = []
        for key, places in groups.items():
            first = 0
            for count in cut(len(places), self._row_counts[key]):
                taken = places[first : first + count]
                first += count
                filled = [rows[place] for place in taken] + [rows[taken[-1]]] * (count - len(taken))
                batches.append(_Batch(places=taken, answers=self._submit(filled)))
        return batches

    def _submit(self, rows: Sequence[Row]) -> Future[Sequence[Answer]]:
        try:
            return self._pool.submit(self._guarded, rows)
        except RuntimeError as error:  # the pool's own word for "shut down"
            raise NotReady("the server is stopping and takes no more requests") from error

    def _guarded(self, rows: Sequence[Row]) -> Sequence[Answer]:
        try:
            answers = self._run(rows)
        except RequestError:
            raise
        except Exception as error:  # whatever the runtime raises: this batch's callers must hear of it, nobody else
            raise RunFailed("the model failed on the rows of this request") from error
        assert len(answers) == len(rows), "run answers every row"
        return answers

    def _collect(self, batches: Sequence[_Batch[Answer]], answered: Sequence[Sequence[Answer]]) -> list[Answer]:
        by_place = {
            place: answer
            for batch, answers in zip(batches, answered, strict=True)
            for place, answer in zip(batch.places, answers, strict=False)  # the copies that filled a batch fall off
        }
        return [by_place[place] for place in range(len(by_place))]


def cut(rows: int, allowed: Sequence[int]) -> list[int]:
    """The batch sizes, each one of `allowed`, that `rows` rows run in, largest first.

    Only where no allowed size is small enough does the last batch hold more places than rows.
    """
    sizes: list[int] = []
    while rows > 0:
        fitting = [count for count in allowed if count <= rows]
        sizes.append(max(fitting) if fitting else min(allowed))
        rows -= sizes[-1]
    return sizes
