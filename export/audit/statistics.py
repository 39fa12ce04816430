"""The tests of the audit and their sample sizes. Knows numbers, neither tensors nor modules.

Formulas: exact binomial test and Clopper-Pearson interval (Clopper and Pearson 1934) by scipy;
sample size of the normal approximation to the two-sided test at level a and power b, N >= (z[1-a/2]
+ z[b])^2 variance / shift^2; Student's interval for means of draws; chi-square for their
dispersion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats  # type: ignore[import-untyped, unused-ignore] # scipy ships no types

from evalmode.export.audit.site import Interval

_POWER = 0.995  # what the approximation must promise for the exact test to find 99 in 100
# Below this drop rate the audit need not find smaller gaps than at it.
SMALLEST_DROP = 0.02
# The share of a margin that is no gap: a large tensor would show the rounding of a half-precision
# uniform.
NEGLIGIBLE = 0.1


def margin(drop: float) -> float:
    """The relative gap that the audit must not miss at this drop rate: a quarter of it, of .02 at
    least.
    """
    return max(drop, SMALLEST_DROP) / 4


def masks_needed(keep: float, balance: float, *, alpha: float) -> int:
    """How many independent mask groups tell a keep rate near `keep` from `balance` when they are a
    margin apart.

    `balance` is the keep rate at which there is no gap (eval scale / train scale). The shift and
    the variance are the least favourable of the two rates, since the gap may lie on either side.
    """
    rates = [rate for rate in (keep, balance) if 0.0 < rate <= 1.0] or [0.5]
    return max(_masks(rate, alpha) for rate in rates)


def _masks(rate: float, alpha: float) -> int:
    near = margin(1 - rate)
    # To the nearer of the two rates that lie a margin away, less what is negligible.
    shift = (1 - NEGLIGIBLE) * rate * near / (1 + near)
    spread = max(
        other * (1 - other) for other in (rate, max(rate - shift, 0.0), min(rate + shift, 1.0))
    )
    return math.ceil(_quantiles(alpha) ** 2 * spread / shift**2)


def draws_needed(variance: float, shift: float, *, alpha: float) -> int:
    """How many draws of this variance place their mean within `shift`, in Student's interval at
    level alpha.
    """
    return math.ceil(_quantiles(alpha) ** 2 * variance / shift**2)


def _quantiles(alpha: float) -> float:
    return float(stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(_POWER))


def exact_interval(kept: int, groups: int, *, alpha: float) -> Interval:
    """Clopper and Pearson's interval of the keep rate, at level alpha."""
    low = stats.beta.ppf(alpha / 2, kept, groups - kept + 1) if kept else 0.0
    high = stats.beta.ppf(1 - alpha / 2, kept + 1, groups - kept) if kept < groups else 1.0
    return float(low), float(high)


def exact_p(kept: int, groups: int, balance: Interval) -> float:
    """How likely so unlikely a count is when the keep rate lies in `balance`: the two-sided exact
    binomial test.

    The interval is as wide as the rounding of the scales that it was computed from.
    """
    low, high = (min(max(end, 0.0), 1.0) for end in balance)
    if balance[0] > 1.0:
        return 0.0  # no keep rate makes up for such scales
    nearest = min(max(kept / groups, low), high)
    return (
        1.0
        if low <= kept / groups <= high
        else float(stats.binomtest(kept, groups, nearest).pvalue)
    )


def mean_interval(values: Sequence[float], *, alpha: float) -> Interval:
    """Student's interval of the mean of at least two independent draws."""
    sample = np.asarray(values, dtype=np.float64)
    half = float(
        stats.t.ppf(1 - alpha / 2, sample.size - 1) * sample.std(ddof=1) / math.sqrt(sample.size)
    )
    return float(sample.mean()) - half, float(sample.mean()) + half


def overdispersed(kept: Sequence[int], groups: Sequence[int]) -> bool:
    """Whether counts spread wider than independent groups would let them, once in ten thousand by
    chance.
    """
    counts, sizes = np.asarray(kept, dtype=np.float64), np.asarray(groups, dtype=np.float64)
    rate = counts.sum() / sizes.sum()
    if rate in (0.0, 1.0) or counts.size < 2:
        return False
    statistic = float((((counts - sizes * rate) ** 2) / (sizes * rate * (1 - rate))).sum())
    return bool(statistic > stats.chi2.ppf(1 - 1e-4, counts.size - 1))
