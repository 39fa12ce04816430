"""Scores: the probabilities of a classifier's labels, with the same bits on every machine.

`math.exp` and `numpy.exp` depend on the C library and the processor: with and without fused
multiply-add the last bits differ. Here only operations are used that IEEE 754 rounds correctly
(addition, multiplication, division, floor), one at a time, and so equal logits have equal scores
everywhere. Every row is computed by itself, whatever rows are beside it.

Shapes: B rows, C labels.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from evalmode.service.errors import RunFailed

Floats: TypeAlias = npt.NDArray[np.float64]

# exp(x) = 2^(k / _STEPS) * exp(r), with a whole number k and |r| <= ln 2 / (2 * _STEPS) = 0.0014.
# The first factor is from a table; the Taylor polynomial of degree 4 gives the second one with a
# relative error of r^5 / 120 < 5e-17, which is less than half a unit of the last place.
_STEPS = 256

# Differences of logits are rounded down to multiples of this. Two of them are then equal, or so far
# apart that the errors above cannot change their order: a higher logit never has a lower score.
# Rounding changes a score by 1e-12 of itself; the float32 logits are known to 6e-8.
_GRID = 2.0**-40

# Scores below e^-700 are 0. Smaller numbers come near those that some processors flush to zero.
_SMALLEST = -700.0

with localcontext() as _context:
    # Decimal computes with integers: the constants have the same bits on every machine.
    _context.prec = 50
    _STEP = Decimal(2).ln() / _STEPS
    _ROOTS = np.array([float((_STEP * index).exp()) for index in range(_STEPS)])
    # ln 2 / _STEPS in two parts. The first is a multiple of _GRID and has 32 bits. k has at most 18
    # bits, so k times it is exact, and subtracting that from x is exact as well.
    _STEP_HIGH = math.floor(_STEP / Decimal(_GRID)) * _GRID
    _STEP_LOW = float(_STEP - Decimal(_STEP_HIGH))
    _STEPS_PER_UNIT = float(1 / _STEP)


def softmax(logits: npt.ArrayLike) -> Floats:
    """The probabilities (B, C) of the logits (B, C), in float64.

    A label whose logit is -inf has the probability 0. Raises RunFailed for a row without
    probabilities: with a NaN, an infinity, or only -inf.

    >>> softmax([[0.0, 0.0], [0.0, float("-inf")]]).tolist()
    [[0.5, 0.5], [1.0, 0.0]]
    """
    logits = np.asarray(logits)
    x = logits.astype(np.float64)
    largest = x.max(axis=1, keepdims=True)
    if not all(map(math.isfinite, largest[:, 0].tolist())):
        raise RunFailed("the model answered a row of this request with numbers that are not finite")
    # Each operation below takes about as long for some rows as for one, so there are few of them,
    # and they work in place.
    if logits.dtype == np.float64:
        with np.errstate(over="ignore"):  # a difference may be -inf
            x -= largest
    else:
        x -= largest
    has_zeros = x.min() < _SMALLEST
    if has_zeros:
        is_zero = x < _SMALLEST
        np.maximum(x, _SMALLEST, out=x)
    x *= 1 / _GRID  # a power of two, so nothing rounds
    np.floor(x, out=x)
    x *= _GRID

    k = x * _STEPS_PER_UNIT
    k += 0.5
    np.floor(k, out=k)
    index = k.astype(np.int64)
    r = x
    r -= k * _STEP_HIGH
    k *= _STEP_LOW
    r -= k
    # 1 + r + r^2 / 2 + r^3 / 6 + r^4 / 24, by Horner's rule.
    powers = r * (1 / 24)
    powers += 1 / 6
    for coefficient in (0.5, 1.0, 1.0):
        powers *= r
        powers += coefficient
    powers *= _ROOTS[index & (_STEPS - 1)]
    np.ldexp(powers, index >> _STEPS.bit_length() - 1, out=powers)
    if has_zeros:
        powers[is_zero] = 0.0

    # `fsum` rounds once, so the order of the labels does not matter.
    totals = [math.fsum(row) for row in powers.tolist()]
    powers /= np.array(totals)[:, None]
    return powers


def ranking(logits: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """The labels (B, C) of each row of logits (B, C), highest first.

    Of equal logits the lower label is first.

    >>> ranking([[0.2, 0.3, 0.2, 0.3]]).tolist()
    [[1, 3, 0, 2]]
    """
    return np.argsort(-np.asarray(logits, np.float64), axis=1, kind="stable")
