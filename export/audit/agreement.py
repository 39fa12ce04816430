"""Whether the mean of a whole output is eval's: for noise of no known form.

Let u be a training output's difference from eval, over eval's norm, and b its mean, the bias. Two
independent differences u and v have a product u . v with mean |b|^2, whatever the noise, and no
element has to be left out. Each block of draws gives one value: the mean product of all its pairs.
Student's interval of these values decides whether |b| is below the margin.

After a non-linear step a bias proves no gap, so the outcome is either no gap or unsure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch import Tensor

from evalmode.export.audit import statistics
from evalmode.export.audit.site import MOST_DRAWS, Figures, Outcome

# Enough blocks for Student's t to be near the normal distribution; more blocks leave fewer pairs in
# each, and pairs are what makes the products precise.
_BLOCKS = 32
# Draws that size the blocks: 16 independent pairs.
_PILOT_DRAWS = 32


def compare_means(
    draw_differences: Callable[[int], Iterator[Tensor]],
    direction: Tensor,
    *,
    alpha: float,
    draws: int | None,
) -> Figures:
    """Test at level `alpha` whether the mean output is eval's.

    `draw_differences(n)` yields n differences from eval over its norm, shape (elements,).
    `direction` is eval over its norm. The `gap` of the figures is the slope of training's output on
    eval's, 1 where they agree; the outcome rests on the whole output.
    """
    # The margin of |b| is that of a mask whose noise has the same power.
    pilot = list(draw_differences(_PILOT_DRAWS))
    power = sum(float(u @ u) for u in pilot) / len(pilot)
    margin = statistics.margin(power / (1 + power))

    # The draws per block that can tell b = 0 from the margin. The mean over all pairs of m draws
    # has 2 / m^2 times the variance of one pair. So the blocks need the square root of the draws
    # that single pairs would.
    pairs = [float(u @ v) for u, v in zip(pilot[::2], pilot[1::2], strict=True)]
    mean = sum(pairs) / len(pairs)
    variance = math.fsum((pair - mean) ** 2 for pair in pairs) / (len(pairs) - 1)
    needed = statistics.draws_needed(variance, margin**2 / 2, alpha=alpha)
    block_count = _BLOCKS
    block_size = max(math.ceil(math.sqrt(2 * needed / _BLOCKS)), 2)
    block_size = min(block_size, MOST_DRAWS // _BLOCKS)
    if draws is not None:
        block_count = max(min(_BLOCKS, draws // 2), 2)
        block_size = max(draws // block_count, 2)

    products: list[float] = []
    slopes: list[float] = []
    for _ in range(block_count):
        # The sum of u . v over all pairs u != v of a block is |sum u|^2 - sum |u|^2.
        block = draw_differences(block_size)
        u = next(block)
        total, squares = u.clone(), float(u @ u)
        count = 1
        slopes.append(1 + float(u @ direction))
        for u in block:
            total += u
            squares += float(u @ u)
            count += 1
            slopes.append(1 + float(u @ direction))
        products.append((float(total @ total) - squares) / (count * (count - 1)))

    _, high = statistics.mean_interval(products, alpha=alpha)
    outcome = Outcome.NO_GAP if high <= margin**2 else Outcome.UNSURE
    return Figures(
        outcome=outcome,
        forward_count=len(slopes),
        gap=sum(slopes) / len(slopes),
        gap_interval=statistics.mean_interval(slopes, alpha=alpha),
    )
