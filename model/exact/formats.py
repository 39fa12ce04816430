"""The number formats of the exact network, and the sizes of a network that they allow.

Knows no torch: a configuration checks its sizes here.
"""

from __future__ import annotations

from dataclasses import dataclass

# A float32 has a significand of 24 bits: it holds every integer up to this one.
LARGEST = 2**24


@dataclass(frozen=True, kw_only=True)
class Format:
    """Integers from `low` to `high`, each worth 2^-fraction_bits.

    >>> Format(low=-128, high=127, fraction_bits=5).largest
    128
    """

    low: int
    high: int
    fraction_bits: int

    @property
    def largest(self) -> int:
        """The largest magnitude of an integer of this format."""
        return max(-self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class SumFormat:
    """Sums that are neither floored nor clipped: multiples of 2^-grid_bits, in units of
    2^-fraction_bits.

    grid_bits   None: the grid of each channel is what the weights of that channel make it
    """

    fraction_bits: int
    grid_bits: int | None = None


TABLE = Format(low=-127, high=127, fraction_bits=7)
POSITION = Format(low=-(2**15), high=2**15 - 1, fraction_bits=12)
# What the layers add up. Its tensors hold quarters: the norm then takes its 16 bits by a floor
# alone, without a multiplication. The weights that write to it are multiples of 2^-9, because an
# input of 5 fraction bits times 2^-9 is a multiple of 2^-14.
STREAM = SumFormat(fraction_bits=12, grid_bits=14)
NORMED = Format(low=-128, high=127, fraction_bits=5)
PROJECTED = Format(low=-127, high=127, fraction_bits=5)
# The softmax gives 255 parts that are read as 256ths. The lost 0.4 % is learned by the weights.
ATTENTION = Format(low=0, high=255, fraction_bits=8)
HIDDEN = Format(low=0, high=255, fraction_bits=5)
LOGITS = SumFormat(fraction_bits=0)

# Added to the scores of keys that a query must not see. Far below every real score, and still an
# integer of 24 bits with two of them and a real score added up.
MASKED = -(2**22)

MOST_IDS_PER_POSITION = 128
# Scores are sums of K products, K the width of a head, each up to 127^2. For K = 127 real scores
# are within 4,096,766 of one another, so a masked one is at least 97,538 below the best. There a
# unit is 2^-13 nats, so these are 11.9 nats, and the weight of a key is 0 from 6.3 nats on.
MOST_HEAD_WIDTH = 127


def largest_weight(weight_bits: int) -> int:
    """The largest integer of a weight, 127 for 8 bits and 63 for 7.

    Two products of an 8-bit activation and an 8-bit weight can exceed 16 bits, and int8 kernels for
    x86 processors without VNNI saturate there. With 7-bit weights they cannot: 2 * 255 * 63 is
    32,130.
    """
    return 2 ** (weight_bits - 1) - 1


def pooled_format(width: int, *, weight_bits: int) -> Format:
    """The format of a pooled vector: as fine as the product with the head's weights allows.

    Its real numbers are from -4 to 4. 1,023 * 127 * width has 24 bits up to a width of 129, and
    each doubling of the width costs one bit.
    """
    fraction_bits = 8
    while (2 ** (fraction_bits + 2) - 1) * largest_weight(weight_bits) * width >= LARGEST:
        fraction_bits -= 1
    high = 2 ** (fraction_bits + 2) - 1
    return Format(low=-high, high=high, fraction_bits=fraction_bits)


def require_exact_sizes(
    *,
    width: int,
    heads: int,
    feed_forward: int,
    positions: int,
    ids_per_position: int,
    weight_bits: int,
) -> None:
    """Raise ValueError unless every single product of a network of these sizes fits 24 bits.

    The limits hold for the worst weights that the formats allow. The residual stream adds up many
    products, and its limit depends on the trained weights: `ExactTransformer.freeze` checks it.
    """
    weight = largest_weight(weight_bits)
    with_7_bits = ", or set weight_bits=7" if weight_bits > 7 else ""

    # The mean of G ids is their sum times 1 / G, exact for powers of two. The table's unit is 32 of
    # the stream's, whose grid is a quarter: so G is at most 128.
    if ids_per_position & (ids_per_position - 1) or ids_per_position > MOST_IDS_PER_POSITION:
        raise ValueError(
            "exact arithmetic needs ids_per_position to be a power of two up to"
            f" {MOST_IDS_PER_POSITION}, got ids_per_position={ids_per_position}: use another front"
            " end, or arithmetic=float32"
        )

    # Sums of a linear layer: its inputs times the largest input times the largest weight.
    most = LARGEST // (NORMED.largest * weight)
    _require(width, most, "width", f"use a smaller width{with_7_bits}")
    most = LARGEST // (HIDDEN.largest * weight)
    _require(feed_forward, most, "feed_forward", f"use a smaller feed_forward{with_7_bits}")

    _require(width // heads, MOST_HEAD_WIDTH, "width / heads", "use more heads or a smaller width")

    # Values are averaged over T positions with weights of up to 255.
    most = LARGEST // (ATTENTION.largest * PROJECTED.largest)
    _require(positions, most, "positions", "use a front end with shorter rows")


def _require(size: int, most: int, key: str, way_out: str) -> None:
    if size > most:
        raise ValueError(
            f"exact arithmetic needs {key} to be at most {most}, so that sums fit the 24 bits of"
            f" float32, got {key}={size}: {way_out}"
        )
