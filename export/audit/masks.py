"""Reading masks from noise: their kept value, their groups, and whether groups are independent.

A group is the elements that are always kept or dropped together, such as those of a channel.
Noise is a float64 tensor with NaN where it is not visible. A mask is 0 where it drops and one value
where it keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A correlation counts from this many standard errors on, which chance reaches once in a billion.
_SIGNIFICANT = 6.0


@dataclass
class MaskPattern:
    """The value of a mask where it keeps, and the axes along which it varied in some draw."""

    value: float
    varies: tuple[bool, ...]
    # Whether any element was dropped in any draw.
    dropped: bool = False

    @property
    def shared(self) -> tuple[int, ...]:
        """The axes along which elements are kept or dropped together.

        Without a dropped element there is no evidence of sharing: then there are none.
        """
        if not self.dropped:
            return ()
        return tuple(axis for axis, varies in enumerate(self.varies) if not varies)

    def joined(self, other: MaskPattern) -> MaskPattern:
        """The pattern that the draws of both patterns show together."""
        varies = tuple(a or b for a, b in zip(self.varies, other.varies, strict=True))
        return MaskPattern(self.value, varies, self.dropped or other.dropped)


def kept_value(noise: Tensor, *, rounding: float) -> float | None:
    """The value v > 0 of noise that is 0 or v everywhere, within a few relative `rounding` steps.

    None for noise that is no mask, or that keeps nothing.
    """
    values = noise[~noise.isnan() & (noise != 0)]
    if values.numel() == 0:
        return None
    value = float(values.median())
    return value if value > 0 and fits(noise, value, rounding=rounding) else None


def fits(noise: Tensor, value: float, *, rounding: float) -> bool:
    """Whether noise is 0 or `value` wherever it is visible, up to four rounding steps."""
    to_zero = noise.abs() + value * (noise != 0)  # 0 for a zero, more than `value` for the others
    difference = torch.minimum((noise - value).abs(), to_zero)
    return not bool((difference > 4 * rounding * value).any())  # NaN compares as False


def pattern_of(noise: Tensor, value: float) -> MaskPattern:
    """The pattern of one draw: it varies along axes with both kept and dropped elements."""
    is_visible, is_kept = ~noise.isnan(), noise > value / 2
    is_dropped = is_visible & ~is_kept
    varies = []
    for axis in range(noise.dim()):
        # Of an axis with one element nothing is known; it counts as shared.
        if noise.shape[axis] > 1:
            varies.append(bool((is_kept.any(axis) & is_dropped.any(axis)).any()))
        else:
            varies.append(False)
    return MaskPattern(value, tuple(varies), bool(is_dropped.any()))


def groups(noise: Tensor, pattern: MaskPattern) -> tuple[Tensor, Tensor]:
    """Which groups of elements are visible, and which are kept, as two boolean tensors.

    Elements that differ along shared axes alone are one group; these axes have size 1 in the
    results.
    """
    is_visible, is_kept = ~noise.isnan(), noise > pattern.value / 2
    for axis in pattern.shared:
        is_visible, is_kept = is_visible.any(axis, keepdim=True), is_kept.any(axis, keepdim=True)
    return is_visible, is_kept


def neighbours_agree(is_visible: Sequence[Tensor], is_kept: Sequence[Tensor]) -> bool:
    """Whether neighbours along an axis are kept together more often, or less, than by chance.

    `is_visible` and `is_kept` are the groups of several draws, as `groups` returns them.
    """
    all_visible = torch.stack(list(is_visible))  # (draws, *groups)
    all_kept = torch.stack(list(is_kept)).to(torch.float64)
    rate = float(all_kept[all_visible].mean())
    if rate in (0.0, 1.0):
        return False
    deviation = (all_kept - rate) * all_visible
    # Axis 0 counts the draws, which are independent.
    for axis in range(1, deviation.dim()):
        length = deviation.shape[axis] - 1
        if length < 1:
            continue
        products = deviation.narrow(axis, 0, length) * deviation.narrow(axis, 1, length)
        both_visible = all_visible.narrow(axis, 0, length) & all_visible.narrow(axis, 1, length)
        pair_count = int(both_visible.sum())
        # Fewer than ten pairs are expected in which both neighbours are kept (or both dropped, if
        # that is rarer): too few for the normal approximation below.
        if pair_count * min(rate, 1 - rate) ** 2 < 10:
            continue
        # Of independent neighbours, a product has mean 0 and standard deviation rate (1 - rate).
        limit = _SIGNIFICANT * rate * (1 - rate) * pair_count**0.5
        if abs(float(products.sum())) > limit:
            return True
    return False
