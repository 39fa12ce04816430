"""What the proof knows of a tensor: its type, its shape, and the bounds of its numbers.

Bounds are computed in float64, and never wrongly:

- Every number in a float32 tensor is an integer times 2^grid. A sum of magnitudes in float64 is
  exact while it stays below 2^53 steps of the grid. Above that the computed sum is at least 2^53
  steps too, because rounding is monotone; it is then refused, since float32 holds 2^24 steps.
- A product of two bounds of float32 numbers has at most 48 bits.
- Integers are followed up to 2^53. Bounds of stored integers beyond that are rounded outwards.

`C` is the number of channels: the size of the last axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from evalmode.export.graph import Weight
from evalmode.export.graph.errors import Broken
from evalmode.export.graph.weight import Array

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

SIGNIFICAND_BITS = 24
"""Of float32, with the leading bit that is not stored."""

# Normal float32 numbers go from 2^-126 to 2^128, and some machines take smaller ones for zero. A
# runtime may multiply up to three constants before it uses them (a scale on each side of a matrix
# product and one behind it), so a third of the range is used: 2^-120 to 2^120 for three together.
FINEST, COARSEST = -40, 40

# Integers beyond this are not exact in float64, in which bounds are held.
LARGEST_INTEGER = 2.0**53

# No machine addresses more elements, so no axis that holds any is longer.
LONGEST_AXIS = 2**47

MOST_CHANNELS = 1 << 20
"""More channels are not told apart: their bounds would take more memory than the weights."""

# Elements of a stored tensor that are examined at once.
_CHUNK = 1 << 20

FLOAT32 = np.dtype(np.float32)
BOOL = np.dtype(np.bool_)
INT64 = np.dtype(np.int64)
_INTEGER_KINDS = "iu"


class NotExact(Exception):  # noqa: N818 - read as a sentence: "raise NotExact"
    """An operator may round, or may do what the proof does not follow. The text says why."""


@dataclass(frozen=True)
class Extent:
    """The size of an axis: from `lowest` to `largest`, which is None for any size.

    `symbol` is the identity of a size that is known only at run time: two extents with the same
    symbol have the same size in one run. `label` is what a user calls the axis.
    """

    lowest: int
    largest: int | None
    symbol: str = ""
    label: str = ""

    @classmethod
    def exactly(cls, size: int) -> Extent:
        """The extent of an axis whose size the file fixes."""
        return cls(size, size)

    @property
    def exact(self) -> int | None:
        """The size if only one is possible."""
        return self.lowest if self.lowest == self.largest else None

    def is_same_as(self, other: Extent) -> bool:
        """Whether both have the same size in every run."""
        if self.symbol and self.symbol == other.symbol:
            return True
        return self.exact is not None and self.exact == other.exact


Shape = tuple[Extent, ...]


def shape_of(sizes: Sequence[int]) -> Shape:
    """The shape of an array."""
    return tuple(Extent.exactly(size) for size in sizes)


@dataclass(frozen=True, eq=False, kw_only=True)
class Bounds:
    """What is known of the numbers in a tensor, for all of them or for each channel.

    Each array has the shape (), or (C,) for channels of the last axis.

    grid    each number is an integer times 2^grid; a zero is on every grid
    low     no number is smaller
    high    no number is larger
    bits    each number is an integer below 2^bits times a power of two, which may vary
    negative_zero    some number may be -0.0, on some machine
    """

    grid: Integers
    low: Floats
    high: Floats
    bits: Integers
    negative_zero: bool = False

    @property
    def channels(self) -> int | None:
        """C, or None if the bounds are those of all numbers together."""
        return self.grid.shape[0] if self.grid.ndim else None

    @property
    def largest(self) -> Floats:
        """The largest magnitude."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    @property
    def has_zero(self) -> bool:
        """Whether a number may be zero."""
        return bool(((self.low <= 0) & (self.high >= 0)).any())

    def together(self) -> Bounds:
        """The bounds of all channels together."""
        return Bounds(
            grid=np.asarray(self.grid.min()),
            low=np.asarray(self.low.min()),
            high=np.asarray(self.high.max()),
            bits=np.asarray(self.bits.max()),
            negative_zero=self.negative_zero,
        )

    def take(self, channels: npt.NDArray[np.integer]) -> Bounds:
        """The bounds of these channels, in this order."""
        if self.channels is None or channels.size == 0:
            return self.together()
        return Bounds(
            grid=self.grid[channels],
            low=self.low[channels],
            high=self.high[channels],
            bits=self.bits[channels],
            negative_zero=self.negative_zero,
        )


def steps_of(largest: Floats, grid: Integers) -> Floats:
    """How many steps of the grid a magnitude has."""
    # A change of the exponent, where exp2 of some libraries is an ulp off.
    return np.asarray(np.ldexp(largest, -grid))


def bounded(
    dtype: np.dtype[np.generic],
    *,
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    grid: npt.ArrayLike = 0,
    bits: npt.ArrayLike | None = None,
    negative_zero: bool = False,
    what: str,
) -> Bounds:
    """The bounds of a result, after a check that its type holds every number within them.

    `what` names the result in the reason: "the sum". Raises NotExact otherwise.
    """
    low_array, high_array, grid_array = np.broadcast_arrays(
        np.asarray(low, np.float64), np.asarray(high, np.float64), np.asarray(grid, np.int64)
    )
    if dtype == BOOL or dtype.kind in _INTEGER_KINDS:
        type_low, type_high = limits_of(dtype)
        floor, ceiling = max(type_low, -LARGEST_INTEGER), min(type_high, LARGEST_INTEGER)
        smallest, largest = float(low_array.min()), float(high_array.max())
        if smallest < floor or largest > ceiling:
            extreme = largest if largest > ceiling else smallest
            raise NotExact(f"{what} may reach {extreme:.6g}, which may overflow {dtype.name}")
        return integer_bounds(low_array, high_array)

    magnitude = np.maximum(np.abs(low_array), np.abs(high_array))
    is_zero = magnitude == 0
    grid_array = np.where(is_zero, COARSEST, np.minimum(grid_array, COARSEST))
    steps = steps_of(magnitude, grid_array)
    by_grid = _bits_of_steps(steps)
    bits_array = by_grid if bits is None else np.minimum(by_grid, np.asarray(bits, np.int64))
    too_wide = bits_array > SIGNIFICAND_BITS
    if too_wide.any():
        # A little more than 24 must not read as 24.0.
        needed = max(float(np.log2(steps[too_wide]).max()), SIGNIFICAND_BITS + 0.1)
        raise NotExact(f"{what} may need {needed:.1f} bits, and float32 has {SIGNIFICAND_BITS}")
    if (grid_array < FINEST).any():
        finest = int(grid_array.min())
        raise NotExact(f"{what} may have steps of 2^{finest}, finer than 2^{FINEST}")
    if (magnitude > 2.0**COARSEST).any():
        raise NotExact(f"{what} may reach {float(magnitude.max()):.3g}, beyond 2^{COARSEST}")
    has_zero = bool(((low_array <= 0) & (high_array >= 0)).any())
    return Bounds(
        grid=grid_array,
        low=low_array,
        high=high_array,
        bits=bits_array,
        negative_zero=negative_zero and has_zero,
    )


def require_factor(factor: Bounds) -> None:
    """Raise NotExact for a factor outside the range in which three of them can be multiplied.

    Results are within it. Stored numbers need not be.
    """
    if int(factor.grid.min()) < FINEST:
        raise NotExact(f"a factor has bits of 2^{int(factor.grid.min())}, finer than 2^{FINEST}")
    largest = float(factor.largest.max())
    if largest > 2.0**COARSEST:
        raise NotExact(f"a factor may be {largest:.3g}, beyond 2^{COARSEST}")


def integer_bounds(low: npt.ArrayLike, high: npt.ArrayLike) -> Bounds:
    """The bounds of integers, without a check of their type."""
    low_array, high_array = np.broadcast_arrays(
        np.asarray(low, np.float64), np.asarray(high, np.float64)
    )
    magnitude = np.maximum(np.abs(low_array), np.abs(high_array))
    return Bounds(
        grid=np.zeros(low_array.shape, np.int64),
        low=low_array,
        high=high_array,
        bits=_bits_of_steps(magnitude),
    )


def limits_of(dtype: np.dtype[np.generic]) -> tuple[float, float]:
    """The smallest and the largest value of an integer or boolean type.

    float64 rounds those of 64-bit types outwards.
    """
    if dtype == BOOL:
        return 0.0, 1.0
    bits = 8 * dtype.itemsize
    if dtype.kind == "u":
        return 0.0, float(2**bits - 1)
    return -float(2 ** (bits - 1)), float(2 ** (bits - 1) - 1)


def type_bounds(dtype: np.dtype[np.generic]) -> Bounds:
    """The bounds of everything that an integer or boolean type holds."""
    return integer_bounds(*limits_of(dtype))


def joined(parts: Sequence[Bounds]) -> Bounds:
    """The bounds of numbers that are those of any of the parts, channel by channel if possible."""
    channels = {part.channels for part in parts} - {None}
    if len(channels) > 1:
        parts = [part.together() for part in parts]
    grid, low, high, bits = parts[0].grid, parts[0].low, parts[0].high, parts[0].bits
    for part in parts[1:]:
        grid, bits = np.minimum(grid, part.grid), np.maximum(bits, part.bits)
        low, high = np.minimum(low, part.low), np.maximum(high, part.high)
    return Bounds(
        grid=grid,
        low=low,
        high=high,
        bits=bits,
        negative_zero=any(part.negative_zero for part in parts),
    )


def bounds_of_array(array: Array) -> Bounds:
    """The bounds of stored numbers, channel by channel; their signs of zero are known.

    Raises NotExact for numbers that are not followed: NaN, infinities, subnormal numbers, and types
    other than float32, integers and booleans.
    """
    if array.dtype != BOOL and array.dtype.kind not in _INTEGER_KINDS and array.dtype != FLOAT32:
        raise NotExact(f"it reads {array.dtype.name} numbers, and only float32 is followed")
    rows = array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array.reshape(1, -1)
    if rows.size == 0:
        return integer_bounds(0, 0)
    if rows.shape[1] > MOST_CHANNELS:
        return joined([bounds_of_array(part).together() for part in _parts(rows)])
    channels = rows.shape[1]
    if array.dtype != FLOAT32:
        low, high = rows.min(axis=0), rows.max(axis=0)
        floor, ceiling = low.astype(np.float64), high.astype(np.float64)
        floor = np.where(np.abs(floor) > LARGEST_INTEGER, np.nextafter(floor, -np.inf), floor)
        ceiling = np.where(
            np.abs(ceiling) > LARGEST_INTEGER, np.nextafter(ceiling, np.inf), ceiling
        )
        return _squeezed(integer_bounds(floor, ceiling))

    grid = np.full(channels, COARSEST, np.int64)
    bits = np.ones(channels, np.int64)
    low = np.full(channels, np.inf)
    high = np.full(channels, -np.inf)
    negative_zero = False
    step = max(1, _CHUNK // channels)
    for start in range(0, rows.shape[0], step):
        chunk = np.ascontiguousarray(rows[start : start + step], dtype="<f4")
        lowest_bit, widths = significands(chunk)
        grid = np.minimum(grid, lowest_bit.min(axis=0))
        bits = np.maximum(bits, widths.max(axis=0))
        low = np.minimum(low, chunk.min(axis=0))
        high = np.maximum(high, chunk.max(axis=0))
        negative_zero = negative_zero or bool(((chunk == 0) & np.signbit(chunk)).any())
    return _squeezed(Bounds(grid=grid, low=low, high=high, bits=bits, negative_zero=negative_zero))


def _parts(array: Array) -> Iterator[Array]:
    """The elements, at most MOST_CHANNELS at a time."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, MOST_CHANNELS):
        yield flat[start : start + MOST_CHANNELS]


def significands(array: npt.NDArray[np.float32]) -> tuple[Integers, Integers]:
    """The exponent of the lowest bit that is set in each number, and how many bits it needs.

    A zero has the exponent COARSEST and one bit. Raises NotExact for NaN, infinities and subnormal
    numbers.

    >>> [part.tolist() for part in significands(np.float32([0.75, 5.0, 0.0]))]
    [[-2, 0, 40], [2, 3, 1]]
    """
    pattern = np.ascontiguousarray(array, dtype="<f4").view("<i4")
    exponent = (pattern >> 23) & 0xFF
    mantissa = pattern & 0x7FFFFF
    if (exponent == 0xFF).any():
        raise NotExact("a stored number is a NaN or an infinity")
    is_small = exponent == 0
    if (is_small & (mantissa != 0)).any():
        raise NotExact("a stored number is below 2^-126, where some machines read zero")
    significand = mantissa | 0x800000
    lowest = significand & -significand  # a power of two, which float32 holds
    shift = (lowest.astype("<f4").view("<i4") >> 23) - 127
    # The number is significand * 2^(exponent - 150).
    lowest_bit = np.where(is_small, COARSEST, shift + exponent - 150).astype(np.int64)
    widths = np.where(is_small, 1, SIGNIFICAND_BITS - shift).astype(np.int64)
    return lowest_bit, widths


def _squeezed(bounds: Bounds) -> Bounds:
    """The bounds of a single channel as those of all numbers."""
    return bounds.together() if bounds.channels == 1 else bounds


def _bits_of_steps(steps: Floats) -> Integers:
    """The bits that hold every integer of at most this magnitude, up to a power of two.

    2^24 steps need 24 bits: the number 2^24 itself is a power of two, and all others are below.
    """
    mantissa, exponent = np.frexp(steps)  # steps = mantissa * 2^exponent, mantissa in [0.5, 1)
    bits = np.where(mantissa == 0.5, exponent - 1, exponent)
    return np.maximum(bits, 1).astype(np.int64)


@dataclass(frozen=True, eq=False, kw_only=True)
class Tensor:
    """A tensor of the graph, as far as it is known.

    dtype       its type; None if that is not known
    shape       its extents; None if its rank is not known
    computed    the bounds of its numbers; None if nothing is known of them
    stored      its values, for a constant: read when they are needed
    sizes       the extents whose sizes it holds, for a scalar or a list of axis sizes
    reasons     the numbers of the reasons why nothing is known of it
    """

    dtype: np.dtype[np.generic] | None
    shape: Shape | None = None
    computed: Bounds | None = None
    stored: Weight | Array | None = None
    sizes: Shape | None = None
    reasons: frozenset[int] = frozenset()

    @property
    def is_constant(self) -> bool:
        """Whether the file holds its values."""
        return self.stored is not None

    @property
    def is_known(self) -> bool:
        """Whether its numbers have bounds, or are stored and may have."""
        return self.computed is not None or self.stored is not None

    @cached_property
    def array(self) -> Array | None:
        """The stored values. Raises NotExact if they cannot be read."""
        if not isinstance(self.stored, Weight):
            return self.stored
        try:
            return self.stored.array()
        except Broken as error:
            raise NotExact(f"it reads a weight that cannot be read: {error}") from error

    @cached_property
    def bounds(self) -> Bounds:
        """The bounds of its numbers. Raises NotExact for stored numbers that are not followed."""
        if self.computed is not None:
            return self.computed
        assert self.array is not None, "only a tensor that is known has bounds"
        return bounds_of_array(self.array)

    @property
    def channels(self) -> int | None:
        """C, if the file fixes it."""
        return self.shape[-1].exact if self.shape else None

    @cached_property
    def integers(self) -> npt.NDArray[np.int64] | None:
        """Its values, if it is a scalar or a list of integers that the graph decides."""
        if self.dtype is None or self.dtype.kind not in _INTEGER_KINDS or self.shape is None:
            return None
        if len(self.shape) > 1:
            return None
        if self.array is not None:
            return np.atleast_1d(np.asarray(self.array, np.int64))
        if self.computed is None or (self.computed.low != self.computed.high).any():
            return None
        size = 1 if not self.shape else self.channels
        if size is None or np.abs(self.computed.low).max() > LARGEST_INTEGER:
            return None
        return np.broadcast_to(self.computed.low, (size,)).astype(np.int64)
