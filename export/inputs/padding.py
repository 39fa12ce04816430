"""Padding: positions of a batch that a module takes no account of in its other answers.

What a module answers at a padded position is nobody's concern, and implementations differ there:
attention that may look at nothing is 0 in one kernel and a mean in another. Whether positions are
padding is not guessed from an input's name. The module is asked: other values there change nothing
elsewhere.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evalmode.bundle.certificate import relative_difference
from evalmode.bundle.known_answers import Run, Tensors

Positions = npt.NDArray[np.bool_]
"""(B, T)"""


@dataclass(frozen=True, kw_only=True)
class Padding:
    """The positions (B, T) that are padding, and the input that says so."""

    mask: str
    positions: Positions


def axes_of_positions(shape: tuple[int, ...], positions: Positions) -> list[int]:
    """The axes of an answer that may hold its T positions, as in (B, T, D) or (B, H, T, D)."""
    rows, length = positions.shape
    if not shape or shape[0] != rows:
        return []
    return [axis for axis in range(1, len(shape)) if shape[axis] == length]


def at_positions(array: npt.NDArray[np.generic], axis: int) -> npt.NDArray[np.generic]:
    """An answer with its rows and positions first: (B, T, ...)."""
    return np.moveaxis(array, axis, 1)


def padding_at(run: Run, inputs: Tensors, positions: Positions, limit: float) -> Padding | None:
    """The padding that holds all of these positions, as one of the inputs says; None where there is
    none.

    `limit` is the relative difference up to which answers are the same.
    """
    candidates = sorted(
        _candidates(inputs, positions), key=lambda item: len(np.unique(inputs[item[0]]))
    )
    for name, padded in candidates:
        others = {
            other: array
            for other, array in inputs.items()
            if other != name and array.shape[:2] == positions.shape
        }
        # An input of more than two values says more than which positions are padding: its own
        # values there cannot be others.
        if others and len(np.unique(inputs[name])) == 2:
            ignored = _ignores_values(run, inputs, others, padded, limit)
        else:
            ignored = _ignores_presence(run, inputs, padded, limit)
        if ignored:
            return Padding(mask=name, positions=padded)
    return None


def _candidates(inputs: Tensors, positions: Positions) -> Iterator[tuple[str, Positions]]:
    """The inputs that hold one value at all of these positions, with all that have it."""
    rows, length = positions.shape
    for name, array in inputs.items():
        if array.shape == positions.shape and array.dtype.kind in "iub":
            of_positions = array[:, :, np.newaxis]
        elif array.ndim > 2 and array.shape[0] == rows and array.shape[-2] == length:
            # A mask of pairs (B, ..., T, T): a position that may look at nothing.
            of_positions = np.moveaxis(array, -2, 1).reshape(rows, length, -1)
        else:
            continue
        values = np.unique(of_positions[positions])
        if len(values) != 1:
            continue
        padded = (of_positions == values[0]).all(-1)
        if not padded.all():
            yield name, padded


def _ignores_values(
    run: Run, inputs: Tensors, others: Tensors, padded: Positions, limit: float
) -> bool:
    """Whether other values at the padding, such as stand elsewhere, change nothing elsewhere."""
    altered = dict(inputs)
    for name, array in others.items():
        elsewhere = array[~padded]
        changed = array.copy()
        changed[padded] = elsewhere[np.arange(int(padded.sum())) % len(elsewhere)]
        altered[name] = changed
    answers, changed_answers = run(inputs), run(altered)
    for name, answer in answers.items():
        other = changed_answers[name]
        axes = axes_of_positions(answer.shape, padded)
        pairs = [
            (at_positions(answer, axis)[~padded], at_positions(other, axis)[~padded])
            for axis in axes
        ] or [(answer, other)]
        if not any(_same(*pair, limit) for pair in pairs):
            return False
    return True


def _ignores_presence(run: Run, inputs: Tensors, padded: Positions, limit: float) -> bool:
    """Whether each row alone, without its padding, is answered as it is in the batch."""
    rows = len(padded)
    answers = run(inputs)
    for row in np.flatnonzero(padded.any(1) & ~padded.all(1)):
        kept = ~padded[row]
        cut: dict[str, np.ndarray] = {}
        for name, array in inputs.items():
            part = array[row : row + 1] if array.ndim and array.shape[0] == rows else array
            cut[name] = part[:, kept] if array.shape[:2] == padded.shape else part
        try:
            alone = run(cut)
        except Exception:  # the user's own code, which may not read this length
            return False
        for name, answer in answers.items():
            axes = axes_of_positions(answer.shape, padded)
            pairs = [
                (at_positions(answer, axis)[row][kept], at_positions(alone[name], axis)[0])
                for axis in axes
                if alone[name].ndim > axis and alone[name].shape[axis] == kept.sum()
            ] or [(answer[row : row + 1], alone[name])]
            if not any(_same(*pair, limit) for pair in pairs):
                return False
    return True


def _same(answer: np.ndarray, other: np.ndarray, limit: float) -> bool:
    if answer.shape != other.shape:
        return False
    if answer.dtype.kind != "f":
        return np.array_equal(answer, other)
    return relative_difference(other, answer) <= limit
