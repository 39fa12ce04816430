"""Padding: positions of a batch that have no influence on a module's answers at other positions.

A module's own answers at padding mean nothing, and implementations differ there: attention to no
position at all is 0 in one kernel and a mean in another. Padding is not guessed from the name of an
input. The module decides: positions are padding if changing them changes no other answer.

The ladder of padded lengths is in bundle/frontend.py.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evalmode.bundle.certificate import relative_difference
from evalmode.bundle.known_answers import Run, Tensors

Positions = npt.NDArray[np.bool_]  # (B, T)


@dataclass(frozen=True, kw_only=True)
class Padding:
    """The positions (B, T) that are padding, and the input that marks them."""

    mask: str
    positions: Positions


def axes_of_positions(shape: tuple[int, ...], positions: Positions) -> list[int]:
    """The axes of an answer that may hold its T positions, as in (B, T, D) or (B, H, T, D)."""
    rows, length = positions.shape
    if not shape or shape[0] != rows:
        return []
    return [axis for axis in range(1, len(shape)) if shape[axis] == length]


def at_positions(array: npt.NDArray[np.generic], axis: int) -> npt.NDArray[np.generic]:
    """A view of an answer with its rows and positions first: (B, T, ...)."""
    return np.moveaxis(array, axis, 1)


def padding_at(run: Run, inputs: Tensors, positions: Positions, limit: float) -> Padding | None:
    """The padding that includes all of `positions`, or None if one of them is not padding.

    1. An input is a candidate if it has the same value at all of the positions. All positions with
       that value are then the padding that it would mark.
    2. Candidates with few different values come first: a mask has two.
    3. A mask beside other inputs marks padding if other values of those inputs at the padding
       change no answer elsewhere.
    4. Any other candidate marks padding if each row without its padding gets the same answers.

    Answers are the same up to the relative difference `limit`.
    """

    def count_values(candidate: tuple[str, Positions]) -> int:
        return len(np.unique(inputs[candidate[0]]))

    for name, padded in sorted(_candidates(inputs, positions), key=count_values):
        others = {
            other: array
            for other, array in inputs.items()
            if other != name and array.shape[:2] == positions.shape
        }
        # An input of more than two values is more than a mask: its values at padding may matter
        # too. They cannot be changed, because they mark the padding.
        if others and len(np.unique(inputs[name])) == 2:
            is_padding = _ignores_values(run, inputs, others, padded, limit)
        else:
            is_padding = _ignores_presence(run, inputs, padded, limit)
        if is_padding:
            return Padding(mask=name, positions=padded)
    return None


def _candidates(inputs: Tensors, positions: Positions) -> Iterator[tuple[str, Positions]]:
    """The inputs that have the same value at all `positions`, with all positions of that value."""
    rows, length = positions.shape
    for name, array in inputs.items():
        if array.shape == positions.shape and array.dtype.kind in "iub":
            by_position = array[:, :, np.newaxis]
        elif array.ndim > 2 and array.shape[0] == rows and array.shape[-2] == length:
            # A mask of pairs (B, ..., T, T): at padding, attention to every position is masked.
            by_position = np.moveaxis(array, -2, 1).reshape(rows, length, -1)
        else:
            continue
        values = np.unique(by_position[positions])
        if len(values) != 1:
            continue
        padded = (by_position == values[0]).all(-1)
        if not padded.all():
            yield name, padded


def _ignores_values(
    run: Run, inputs: Tensors, others: Tensors, padded: Positions, limit: float
) -> bool:
    """Whether answers elsewhere stay the same with other values at the padding.

    These values are taken from the same input, from positions that are not padding.
    """
    changed = dict(inputs)
    for name, array in others.items():
        elsewhere = array[~padded]
        changed[name] = array.copy()
        changed[name][padded] = elsewhere[np.arange(int(padded.sum())) % len(elsewhere)]
    answers = run(inputs)
    try:
        changed_answers = run(changed)
    except Exception:  # the user's own code, which may refuse these values
        return False
    for name, answer in answers.items():
        other = changed_answers[name]
        pairs = [
            (at_positions(answer, axis)[~padded], at_positions(other, axis)[~padded])
            for axis in axes_of_positions(answer.shape, padded)
        ]
        # An answer without positions, such as a score for each row, must not change at all.
        if not _any_same(pairs or [(answer, other)], limit):
            return False
    return True


def _ignores_presence(run: Run, inputs: Tensors, padded: Positions, limit: float) -> bool:
    """Whether each row gets the same answers alone, without its padding."""
    rows = len(padded)
    answers = run(inputs)
    for row in np.flatnonzero(padded.any(1) & ~padded.all(1)):
        real = ~padded[row]
        inputs_of_row: dict[str, np.ndarray] = {}
        for name, array in inputs.items():
            part = array[row : row + 1] if array.ndim and array.shape[0] == rows else array
            inputs_of_row[name] = part[:, real] if array.shape[:2] == padded.shape else part
        try:
            answers_alone = run(inputs_of_row)
        except Exception:  # the user's own code, which may not read this length
            return False
        for name, answer in answers.items():
            alone = answers_alone[name]
            pairs = []
            for axis in axes_of_positions(answer.shape, padded):
                if alone.ndim > axis and alone.shape[axis] == real.sum():
                    positions_in_batch = at_positions(answer, axis)[row][real]
                    pairs.append((positions_in_batch, at_positions(alone, axis)[0]))
            if not _any_same(pairs or [(answer[row : row + 1], alone)], limit):
                return False
    return True


def _any_same(pairs: list[tuple[np.ndarray, np.ndarray]], limit: float) -> bool:
    """Whether the two answers of some pair are the same; each pair is a reading of the axes."""
    for answer, other in pairs:
        if answer.shape != other.shape:
            continue
        if answer.dtype.kind != "f":
            is_same = np.array_equal(answer, other)
        else:
            is_same = relative_difference(other, answer) <= limit
        if is_same:
            return True
    return False
