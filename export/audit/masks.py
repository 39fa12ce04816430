"""Reading masks: the value that is kept, which elements share their fate, and whether the rest is
independent.

Knows tensors, no modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_DISTINCT = 6.0  # standard errors: what chance does once in a billion


@dataclass
class Shape:
    """What draws have shown so far: the kept value, and the axes along which the mask differs."""

    value: float
    varies: tuple[bool, ...]
    dropped: bool = (
        False  # whether anything was ever dropped beside something kept, or in another draw
    )

    @property
    def shared(self) -> tuple[int, ...]:
        """The axes that share one fate; without a drop there is no evidence of sharing, so none."""
        return (
            tuple(axis for axis, varies in enumerate(self.varies) if not varies)
            if self.dropped
            else ()
        )

    def joined(self, other: Shape) -> Shape:
        """What both have shown together."""
        varies = tuple(a or b for a, b in zip(self.varies, other.varies, strict=True))
        return Shape(self.value, varies, self.dropped or other.dropped)


def kept_value(noise: Tensor, *, rounding: float) -> float | None:
    """The one value v > 0 of noise that is 0 or v everywhere, up to rounding; None for other noise,
    or nothing kept.

    `noise` may hold NaN, which says nothing.
    """
    kept = noise[~noise.isnan() & (noise != 0)]
    if kept.numel() == 0:
        return None
    value = float(kept.median())
    return value if value > 0 and fits(noise, value, rounding=rounding) else None


def fits(noise: Tensor, value: float, *, rounding: float) -> bool:
    """Whether noise is 0 or `value` wherever it is not NaN, up to four rounding steps."""
    away = torch.minimum((noise - value).abs(), noise.abs() + value * (noise != 0))
    return not bool((away > 4 * rounding * value).any())  # NaN compares as False


def shape_of(noise: Tensor, value: float) -> Shape:
    """What one draw shows: along which axes something is kept beside something dropped."""
    seen, kept = ~noise.isnan(), noise > value / 2
    dropped = seen & ~kept
    varies = tuple(
        bool((kept.any(axis) & dropped.any(axis)).any()) if noise.shape[axis] > 1 else False
        for axis in range(noise.dim())
    )
    return Shape(value, varies, bool(dropped.any()))


def groups(noise: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Which groups are seen, and which kept, where the axes that share one fate are one group."""
    seen, kept = ~noise.isnan(), noise > shape.value / 2
    return _any(seen, shape.shared), _any(kept, shape.shared)


def _any(flags: Tensor, axes: tuple[int, ...]) -> Tensor:
    for axis in axes:
        flags = flags.any(axis, keepdim=True)
    return flags


def neighbours_agree(seen: Sequence[Tensor], kept: Sequence[Tensor]) -> bool:
    """Whether neighbours along an axis share their fate more often, or less, than independent ones
    would.
    """
    every_seen, every_kept = torch.stack(list(seen)), torch.stack(list(kept)).to(torch.float64)
    rate = float(every_kept[every_seen].mean())
    if rate in (0.0, 1.0):
        return False
    away = (every_kept - rate) * every_seen
    return any(
        _correlated(away, every_seen, axis, rate)
        for axis in range(1, away.dim())
        if away.shape[axis] > 1
    )


def _correlated(away: Tensor, seen: Tensor, axis: int, rate: float) -> bool:
    length = away.shape[axis] - 1
    products = away.narrow(axis, 0, length) * away.narrow(axis, 1, length)
    pairs = int((seen.narrow(axis, 0, length) & seen.narrow(axis, 1, length)).sum())
    # Independent: mean 0, variance (rate (1 - rate))^2. Too few pairs that fell together prove
    # nothing either way.
    if pairs * min(rate, 1 - rate) ** 2 < 10:
        return False
    return bool(abs(float(products.sum())) > _DISTINCT * rate * (1 - rate) * pairs**0.5)
