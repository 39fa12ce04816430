"""Faults that the values of weights show: a dropout mask drawn at export, a NaN from training.

A dropout mask has three properties. A weight is reported only if it has all of them:

- It holds 0 and c = 1/(1-p), and nothing else. A pruned weight holds many values. A mask of 0 and 1
  is not reported, because it may be a pruning mask (c would be 1).
- The share of its elements that are not 0 is 1/c. Most masks with a purpose have another share.
- Its zeros have no order. A causal mask, an identity and a one-hot table have one.

Noise that was multiplied into a weight has no such form. The rule baked-noise finds it by a second
export.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from evalmode.bundle.certificate import Finding, Severity
from evalmode.export.graph import Graph, ModelUnreadable, Weight
from evalmode.export.graph.errors import Broken

_MIN_ELEMENTS = 100  # of fewer, chance and order cannot be told apart
_MIN_OF_EACH = 5  # dropped elements, and elements that are not
_SAMPLE = 256  # elements, which show for most weights that they are no mask
_MAX_EXAMINED = 1 << 24  # elements of a large mask whose zeros are held in memory
_MAX_COMPARED = 1 << 16  # elements that are correlated with one another to find an order
# Standard deviations of the share of zeros. At 5, one mask in two million is missed.
_SIGMAS = 5.0
# Of the autocorrelation. Larger, since it is tested at each of 32,768 distances.
_SIGMAS_OF_ORDER = 6.5
# Of the spread between rows, or columns. Larger, since chi-squared has a long tail.
_SIGMAS_OF_LINES = 8.0
_MIN_LINES = 16  # rows or columns, for a spread between them
# How far 1/c may be from the share because c was rounded to the weight's type.
_ROUNDING = {"float16": 1e-3, "bfloat16": 8e-3}
# The bits of infinity, by type: the absolute value of a NaN has more.
_INFINITY_BITS = {
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float32": 0x7F800000,
    "float64": 0x7FF0000000000000,
}

_Bits = npt.NDArray[np.bool_]


def mask_like(graph: Graph) -> tuple[Finding, ...]:
    """A warning for each weight that looks like a dropout mask, with the p that it implies.

    Most weights are read at a sample of elements only. Raises ModelUnreadable if the values cannot
    be read.
    """
    findings = []
    with _translated_errors(graph):
        for weight in _float_weights(graph):
            rate = _implied_rate(weight)
            if rate is None:
                continue
            why = (
                f"it holds 0 and {1 / (1 - rate):.4g} in no order, and {1 - rate:.3g} of it is not"
                f" 0: it looks like the mask of a dropout with p = {rate:.3g}, drawn when the model"
                " was exported"
            )
            fix = (
                "export in eval mode, and draw nothing from NumPy or Python in forward; if the"
                " weight is meant to be like this, ignore the warning"
            )
            findings.append(
                Finding(severity=Severity.WARNING, node=weight.path, op="weight", why=why, fix=fix)
            )
    return tuple(findings)


def non_finite_weights(graph: Graph) -> tuple[Finding, ...]:
    """An error for each weight that holds a NaN.

    Infinities are not reported, because attention masks use them. A scalar NaN is not reported
    either: it is a value to compare with or to fill in. All weights are read, a chunk at a time.
    Raises ModelUnreadable if the values cannot be read.
    """
    findings = []
    with _translated_errors(graph):
        for weight in _float_weights(graph):
            if weight.size < 2:
                continue
            # NaN is found by its bits, which is as fast for half precision as for other types.
            unsigned = np.dtype(f"u{weight.dtype.itemsize}")
            infinity = unsigned.type(_INFINITY_BITS[weight.dtype.name])
            without_sign = unsigned.type(np.iinfo(unsigned).max >> 1)
            nan_count = 0
            for chunk in weight.chunks():
                bits = np.ascontiguousarray(chunk).view(unsigned) & without_sign
                nan_count += int(np.count_nonzero(bits > infinity))
            if nan_count == 0:
                continue

            verb = "is" if nan_count == 1 else "are"
            why = f"{nan_count} of its {weight.size} values {verb} not a number"
            fix = (
                "look for the step of the training that diverged, and export a checkpoint from"
                " before it"
            )
            findings.append(
                Finding(severity=Severity.ERROR, node=weight.path, op="weight", why=why, fix=fix)
            )
    return tuple(findings)


@contextmanager
def _translated_errors(graph: Graph) -> Iterator[None]:
    try:
        yield
    except Broken as error:
        raise ModelUnreadable(f"{graph.name} cannot be read: {error}") from error


def _float_weights(graph: Graph) -> list[Weight]:
    return [weight for weight in graph.weights if weight.dtype.name in _INFINITY_BITS]


def _implied_rate(weight: Weight) -> float | None:
    """The p of the dropout whose mask the weight may be, else None. Cheap tests come first."""
    # 1. A sample holds 0 and one other value.
    if weight.size < _MIN_ELEMENTS:
        return None
    scale = _only_scale(next(weight.chunks(_SAMPLE)))
    if scale is None or _only_scale(weight.sample(_SAMPLE)) != scale:
        return None

    # 2. All elements are one of the two.
    bits = _nonzero_bits(weight, scale)
    if bits is None:
        return None
    # If the elements along an axis are equal, as in a mask of whole channels, each counts once.
    for axis in range(bits.ndim):
        first = bits.take([0], axis)
        if (bits == first).all():
            bits = first

    # 3. The share of zeros is that of the scale, up to chance.
    dropped = int(bits.size - np.count_nonzero(bits))
    if bits.size < _MIN_ELEMENTS or min(dropped, bits.size - dropped) < _MIN_OF_EACH:
        return None
    share = 1 / scale
    deviation = (share * (1 - share) / bits.size) ** 0.5
    tolerance = _SIGMAS * deviation + _ROUNDING.get(weight.dtype.name, 1e-6)
    if abs(1 - dropped / bits.size - share) > tolerance:
        return None

    # 4. The zeros have no order.
    rare = bits if bits.mean() <= 0.5 else ~bits
    width = rare.shape[-1]
    table = rare.reshape(-1, width)
    if _has_uneven_lines(table) or _has_uneven_lines(table.T):
        return None
    neighbours = {1, width - 1, width, width + 1}
    if _is_autocorrelated(rare.reshape(-1)[:_MAX_COMPARED], neighbours):
        return None
    return 1 - share


def _only_scale(piece: npt.NDArray[np.generic]) -> float | None:
    """The one value beside 0, if it may be the scale 1/(1-p) of a dropout, else None."""
    values = piece.astype(np.float64)
    nonzero = values[values != 0]
    if nonzero.size == 0 or not 1 < nonzero[0] < np.inf or (nonzero != nonzero[0]).any():
        return None
    return float(nonzero[0])


def _nonzero_bits(weight: Weight, scale: float) -> _Bits | None:
    """Which elements are not 0, in the weight's shape; None if it holds a third value.

    For a very large weight, only the first rows are returned.
    """
    pieces: list[_Bits] = []
    count = 0
    for chunk in weight.chunks():
        bits = chunk != 0
        if (chunk[bits].astype(np.float64) != scale).any():
            return None
        if count < _MAX_EXAMINED:
            pieces.append(bits)
            count += bits.size
    flat: _Bits = np.concatenate(pieces)
    if flat.size == weight.size:
        return flat.reshape(weight.dims)
    row = weight.size // max(weight.dims[0], 1)
    if row > flat.size:
        return flat
    return flat[: flat.size // row * row].reshape(-1, *weight.dims[1:])


def _has_uneven_lines(lines: _Bits) -> bool:
    """Whether the shares of the lines differ too much, as in a triangle, or too little, as in a
    one-hot table.

    The sum of squared differences from the expected count is compared with its mean and standard
    deviation for independent elements (binomial counts, with their fourth moment).
    """
    if len(lines) < _MIN_LINES:
        return False
    rate, size = float(lines.mean()), lines.shape[1]
    variance = size * rate * (1 - rate)  # of the count in one line
    excess = float(((lines.sum(1) - size * rate) ** 2).sum() - len(lines) * variance)
    fourth = 2 * variance**2 + variance * (1 - 6 * rate * (1 - rate))
    spread = (len(lines) * fourth) ** 0.5
    return bool(excess > _SIGMAS_OF_LINES * spread or excess < -_SIGMAS * spread)


def _is_autocorrelated(rare: _Bits, neighbours: set[int]) -> bool:
    """Whether the rare elements repeat at some distance more often, or less often, than by chance.

    `neighbours` are the distances of neighbours in a line, a column and a diagonal. There the
    limits are tighter: few distances are tested, and an order shows there first.
    """
    distances = np.arange(1, rare.size // 2)
    # Autocorrelation by FFT, padded to twice the length so that it does not wrap around.
    spectrum = np.fft.rfft(rare.astype(np.float64), 2 * rare.size)
    pairs = np.fft.irfft(np.abs(spectrum) ** 2)[1 : rare.size // 2]
    expected = (rare.size - distances) * rare.mean() ** 2
    is_near = np.isin(distances, list(neighbours))
    sigmas = np.where(is_near, _SIGMAS, _SIGMAS_OF_ORDER)
    # If hardly any pair is expected, the counts follow a Poisson distribution: a few pairs are
    # still chance.
    slack = np.where(is_near, 3.0, 6.0)
    spread = sigmas * np.sqrt(expected)
    too_many = pairs > expected + spread + slack
    too_few = pairs < expected - spread - 0.5
    return bool(too_many.any() or too_few.any())
