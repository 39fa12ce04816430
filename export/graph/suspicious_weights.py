"""What the values of weights tell on their own: a dropout mask that was drawn at export, a NaN that
was trained in.

A dropout mask holds 0 and c = 1/(1-p) and nothing else, keeps a share of 1/c of its elements, and
has no order. All three must hold, so that a pruned weight (many values), a causal mask (order), a
one-hot table or an identity (order, or another share) and a mask of 0 and 1 (as good as any pruning
mask) raise no alarm. Noise that was multiplied into a weight has no such form; exports under two
seeds find it. Knows no node.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from evalmode.bundle.certificate import Finding, Severity
from evalmode.export.graph import Graph, ModelUnreadable, Weight
from evalmode.export.graph.errors import Broken

_FEWEST = 100  # elements; of fewer, chance and order cannot be told apart
_FEWEST_OF_EACH = 5  # dropped, and kept
_SAMPLED = 256
_EXAMINED = 1 << 24  # elements whose places are kept while a large mask is read
_COMPARED = 1 << 16  # elements that are compared with one another for order
_SIGMAS = 5.0  # for the share that is kept: one mask in two million is missed
_SIGMAS_OF_ORDER = 6.5  # for each of 32,768 distances
_SIGMAS_OF_LINES = (
    8.0  # for what the rows, or the columns, have too different; chi-squared has a long tail
)
_FEWEST_LINES = 16
_ROUNDING = {"float16": 1e-3, "bfloat16": 8e-3}
_EXPONENT = {
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float32": 0x7F800000,
    "float64": 0x7FF0000000000000,
}

_Bits = npt.NDArray[np.bool_]


def mask_like(graph: Graph) -> tuple[Finding, ...]:
    """A warning for every weight that looks like a dropout mask, with the p that it implies.

    Ordinary weights are told by their first elements. Raises ModelUnreadable where the values
    cannot be read.
    """
    with _readable(graph):
        found = [(weight, _implied_rate(weight)) for weight in _floats(graph)]
    return tuple(_mask(weight, rate) for weight, rate in found if rate is not None)


def non_finite_weights(graph: Graph) -> tuple[Finding, ...]:
    """An error for every weight that holds a NaN.

    Infinities are none of its concern, masks are made of them; nor is a NaN alone, which is a value
    to compare with or to fill in. Reads all weights, a piece at a time. Raises ModelUnreadable
    where the values cannot be read.
    """
    with _readable(graph):
        counts = [(weight, _nans(weight)) for weight in _floats(graph) if weight.size > 1]
    return tuple(_nan(weight, count) for weight, count in counts if count)


@contextmanager
def _readable(graph: Graph) -> Iterator[None]:
    try:
        yield
    except Broken as error:
        raise ModelUnreadable(f"{graph.name} cannot be read: {error}") from error


def _mask(weight: Weight, rate: float) -> Finding:
    why = (
        f"it holds 0 and {1 / (1 - rate):.4g} in no order, and {1 - rate:.3g} of it is not 0: it"
        f" looks like the mask of a dropout with p = {rate:.3g}, drawn when the model was exported"
    )
    fix = (
        "export in eval mode, and draw nothing from NumPy or Python in forward; if it is meant to"
        " be so, all is well"
    )
    return Finding(severity=Severity.WARNING, node=weight.path, op="weight", why=why, fix=fix)


def _nan(weight: Weight, count: int) -> Finding:
    why = f"{count} of its {weight.size} values {'is' if count == 1 else 'are'} not a number"
    fix = "look for the step of the training that diverged, and export a checkpoint from before it"
    return Finding(severity=Severity.ERROR, node=weight.path, op="weight", why=why, fix=fix)


def _floats(graph: Graph) -> Iterable[Weight]:
    return [weight for weight in graph.weights if weight.dtype.name in _EXPONENT]


def _implied_rate(weight: Weight) -> float | None:
    """The p of the dropout whose mask the weight may be, else None."""
    if weight.size < _FEWEST:
        return None
    kept = _value_kept(next(weight.chunks(_SAMPLED)))
    if kept is None or _value_kept(weight.sample(_SAMPLED)) != kept:
        return None
    bits = _places(weight, kept)
    if bits is None:
        return None
    bits = _without_repetition(bits)
    dropped = int(bits.size - np.count_nonzero(bits))
    if bits.size < _FEWEST or min(dropped, bits.size - dropped) < _FEWEST_OF_EACH:
        return None
    share = 1 / kept
    tolerance = _SIGMAS * (share * (1 - share) / bits.size) ** 0.5 + _ROUNDING.get(
        weight.dtype.name, 1e-6
    )
    if abs(1 - dropped / bits.size - share) > tolerance or _is_orderly(bits):
        return None
    return 1 - share


def _value_kept(piece: npt.NDArray[np.generic]) -> float | None:
    """The one value beside 0 where it may be that of what a dropout keeps, else None."""
    values = piece.astype(np.float64)
    others = values[values != 0]
    if others.size == 0 or not 1 < others[0] < np.inf or (others != others[0]).any():
        return None
    return float(others[0])


def _places(weight: Weight, kept: float) -> _Bits | None:
    """Where the weight is not 0, in its shape (a very large one's first rows); None where it holds
    a third value.
    """
    pieces, held = [], 0
    for piece in weight.chunks():
        bits = piece != 0
        if (piece[bits].astype(np.float64) != kept).any():
            return None
        if held < _EXAMINED:
            pieces.append(bits)
            held += bits.size
    flat: _Bits = np.concatenate(pieces)
    row = weight.size // max(weight.dims[0], 1)
    if flat.size == weight.size:
        return flat.reshape(weight.dims)
    return (
        flat[: flat.size // row * row].reshape(-1, *weight.dims[1:]) if row <= flat.size else flat
    )


def _without_repetition(bits: _Bits) -> _Bits:
    """One of each: a mask of channels, once it is spread over an image, says no more than it
    did.
    """
    for axis in range(bits.ndim):
        first = bits.take([0], axis)
        if (bits == first).all():
            bits = first
    return bits


def _is_orderly(bits: _Bits) -> bool:
    """Whether chance alone would not have put the zeros where they are."""
    rare = bits if bits.mean() <= 0.5 else ~bits
    table = rare.reshape(-1, rare.shape[-1])
    lines = any(_differ(side) for side in (table, table.T))
    return lines or _meets_itself(
        rare.reshape(-1)[:_COMPARED], near={1, *range(rare.shape[-1] - 1, rare.shape[-1] + 2)}
    )


def _differ(lines: _Bits) -> bool:
    """Whether the lines hold too unequal shares of what is rare, as a triangle does, or too equal
    ones, as one-hots.
    """
    if len(lines) < _FEWEST_LINES:
        return False
    rate, size = float(lines.mean()), lines.shape[1]
    one = size * rate * (1 - rate)
    off = float(((lines.sum(1) - size * rate) ** 2).sum() - len(lines) * one)
    spread = (len(lines) * (2 * one**2 + one * (1 - 6 * rate * (1 - rate)))) ** 0.5
    return bool(off > _SIGMAS_OF_LINES * spread or off < -_SIGMAS * spread)


def _meets_itself(rare: _Bits, near: set[int]) -> bool:
    """Whether what is rare meets itself at some distance more often, or less often, than chance
    would have it.

    At the distances of neighbours in a line, a column and a diagonal, less is enough to tell.
    """
    distances = np.arange(1, rare.size // 2)
    spectrum = np.fft.rfft(rare.astype(np.float64), 2 * rare.size)
    met = np.fft.irfft(np.abs(spectrum) ** 2)[1 : rare.size // 2]
    expected = (rare.size - distances) * rare.mean() ** 2
    is_near = np.isin(distances, list(near))
    sigmas, slack = np.where(is_near, _SIGMAS, _SIGMAS_OF_ORDER), np.where(is_near, 3.0, 6.0)
    spread = sigmas * np.sqrt(expected)
    # Of what is rare, a few meetings are chance though hardly any are expected.
    return bool((met > expected + spread + slack).any() or (met < expected - spread - 0.5).any())


def _nans(weight: Weight) -> int:
    """How many elements are NaN: by their bits, which is as fast for half precision as for any."""
    unsigned = np.dtype(f"u{weight.dtype.itemsize}")
    exponent = unsigned.type(_EXPONENT[weight.dtype.name])
    unsign = unsigned.type(np.iinfo(unsigned).max >> 1)
    pieces = (np.ascontiguousarray(piece).view(unsigned) & unsign for piece in weight.chunks())
    return sum(int(np.count_nonzero(bits > exponent)) for bits in pieces)
