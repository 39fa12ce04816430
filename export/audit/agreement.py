"""Whether a whole output's mean is eval's: for noise of no known form, and so never a proof of a
gap.

With u the difference from eval of a training output, over eval's norm, two independent ones have a
product u . v whose mean is |b|^2, b being the bias over that norm, whatever the noise; no element
is left out. The mean product of all pairs of a block of draws is one value, and Student's interval
of the blocks decides whether |b| is below the margin. Knows no module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch import Tensor

from evalmode.export.audit import statistics as st
from evalmode.export.audit.site import MOST_DRAWS, Measured, Outcome

_BLOCKS = 32
_PILOT = 32


def agreement(
    drawn: Callable[[int], Iterator[Tensor]], direction: Tensor, *, alpha: float, draws: int | None
) -> Measured:
    """`drawn(n)` gives n differences from eval over its norm, shape (elements,); `direction` is
    eval over its norm.

    The gap told is the slope of training's output on eval's, 1 where they agree; the verdict rests
    on all of it.
    """
    near, size = _plan(drawn, alpha)
    blocks = _BLOCKS if draws is None else max(min(_BLOCKS, draws // 2), 2)
    size = size if draws is None else max(draws // blocks, 2)
    products, slopes = [], []
    for _ in range(blocks):
        product, along = _block(drawn(size), direction)
        products.append(product)
        slopes += along
    _, high = st.mean_interval(products, alpha=alpha)
    return Measured(
        outcome=Outcome.NONE if high <= near**2 else Outcome.UNSURE,
        draws=len(slopes),
        gap=sum(slopes) / len(slopes),
        gap_interval=st.mean_interval(slopes, alpha=alpha),
    )


def _plan(drawn: Callable[[int], Iterator[Tensor]], alpha: float) -> tuple[float, int]:
    """The margin of |b|, and how many draws a block needs.

    The margin is that of a mask whose noise has the same power. All pairs of m draws have 2 / m^2
    times the variance of one pair, so that the blocks need the square root of what single pairs
    would.
    """
    draws = list(drawn(_PILOT))
    power = sum(float(u @ u) for u in draws) / len(draws)
    near = st.margin(power / (1 + power))
    pairs = [float(u @ v) for u, v in zip(draws[::2], draws[1::2], strict=True)]
    mean = sum(pairs) / len(pairs)
    variance = math.fsum((pair - mean) ** 2 for pair in pairs) / (len(pairs) - 1)
    needed = st.draws_needed(variance, near**2 / 2, alpha=alpha)
    return near, min(max(math.ceil(math.sqrt(2 * needed / _BLOCKS)), 2), MOST_DRAWS // _BLOCKS)


def _block(draws: Iterator[Tensor], direction: Tensor) -> tuple[float, list[float]]:
    """The mean product of all pairs, and each draw's slope."""
    first = next(draws)
    total, squares, slopes = first.clone(), float(first @ first), [1 + float(first @ direction)]
    for u in draws:
        total += u
        squares += float(u @ u)
        slopes.append(1 + float(u @ direction))
    count = len(slopes)
    return (float(total @ total) - squares) / (count * (count - 1)), slopes
