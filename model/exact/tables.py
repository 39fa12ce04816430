"""The tables that stand for a root, an exponential and two divisions.

Each entry is correctly rounded from integers or decimals, so that every machine builds the same
table: the functions of a C library differ from one to the next.
"""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evalmode.model.exact.formats import ATTENTION, NORMED

# The exponential's index counts 32nds of a nat: a step changes a weight by 3 %.
EXPONENTIAL_STEPS = 32
# The reciprocal of a sum of weights, and the weights times it, are multiples of 2^-16.
RECIPROCAL_BITS = 16
# 16 bits of the stream times these are 24.
ROOT_BITS = 8
# One index of the root's table counts so many squares. At 64 the table has at most 2^18 entries.
SQUARES_PER_INDEX = 64


def reciprocal_roots(width: int, *, most_squares: int, unit: float) -> Tensor:
    """The factor of the RMS norm for each index i, (N, 1) float32 with significands of 8 bits.

    A vector of this width whose squares sum up to S = 64 i + 32, each number in units of `unit` of
    the norm's input, is multiplied by 2^5 / rms. It then has a root mean square of 32, which is 1.0
    in the format NORMED.
    """
    squares = SQUARES_PER_INDEX * (np.arange(most_squares // SQUARES_PER_INDEX + 1) + 0.5)
    # A quotient and a root are correctly rounded by IEEE 754, so these are the same everywhere.
    factors = 2.0**NORMED.fraction_bits / unit * np.sqrt(width / squares)
    return _column(_with_significand(factors, bits=ROOT_BITS))


def exponentials() -> Tensor:
    """255 * exp(-i / 32), rounded to integers, for i from 0 on: (201,) float32.

    The last entry is the first that is 0: a larger index is clipped to it.
    """
    entries: list[int] = []
    while not entries or entries[-1]:
        nats = Decimal(len(entries)) / EXPONENTIAL_STEPS
        entries.append(int(ATTENTION.high * (-nats).exp() + Decimal("0.5")))
    return torch.tensor(entries, dtype=torch.float32)


def reciprocals(positions: int) -> Tensor:
    """255 / n as a multiple of 2^-16, for a sum n of up to `positions` weights: (N, 1) float32.

    The best key's weight is 255, so no sum is smaller. Those entries are 1.
    """
    high = ATTENTION.high
    sums = np.maximum(np.arange(high * positions + 1, dtype=np.int64), high)
    integers = (2**RECIPROCAL_BITS * high * 2 + sums) // (2 * sums)
    return _column(integers / 2**RECIPROCAL_BITS)


def inverse_counts(positions: int, *, scale: float) -> Tensor:
    """`scale` / n for n positions, (positions + 1, 1) float32; 0 for none.

    The significands have as many bits as fit beside a sum of `positions` numbers of 8 bits: 12 for
    32 positions, 10 for 128.
    """
    bits = 24 - 7 - (positions - 1).bit_length()
    counts = np.arange(1, positions + 1)
    inverses = _with_significand(scale / counts, bits=bits)
    return _column(np.concatenate([[0.0], inverses]))


def _with_significand(values: npt.NDArray[np.float64], *, bits: int) -> npt.NDArray[np.float64]:
    """Positive values, each rounded to a significand of so many bits."""
    fractions, exponents = np.frexp(values)  # fractions in [1/2, 1)
    return np.ldexp(np.rint(np.ldexp(fractions, bits)), exponents - bits)


def _column(entries: npt.NDArray[np.float64]) -> Tensor:
    # A column, because torch writes a lookup in one as a single Gather. `torch.tensor`, because it
    # respects torch's meta device.
    return torch.tensor(entries, dtype=torch.float32).unsqueeze(1)
