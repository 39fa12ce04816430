"""The statistical tests of the audit and their sample sizes.

* Keep rates of masks: the exact binomial test, and the interval of Clopper and Pearson (1934).
* Means of draws: Student's interval.
* Independence of groups: a chi-square test of the dispersion of their counts.
* Sample sizes: the normal approximation to a two-sided test at level a and power b,
  N >= (z[1-a/2] + z[b])^2 variance / shift^2.

The distributions are scipy's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats  # type: ignore[import-untyped, unused-ignore] # scipy ships no types

from evalmode.export.audit.site import Interval

# The power of the approximation at which the exact test detects 99 gaps in 100.
_POWER = 0.995
# Below this drop rate the margin shrinks no further: the draws for it would grow without bound.
_SMALLEST_DROP_RATE = 0.02
# The share of a margin that counts as no gap. Without it, a large tensor would show the rounding of
# a uniform random number in half precision as a gap.
NEGLIGIBLE = 0.1


def margin(drop_rate: float) -> float:
    """The relative gap that the audit must detect at this drop rate: a quarter of the rate.

    An unscaled dropout has four times that gap. Very small rates have the margin of a larger one.
    """
    return max(drop_rate, _SMALLEST_DROP_RATE) / 4


def masks_needed(keep_rate: float, balance: float, *, alpha: float) -> int:
    """The number of independent groups that can tell a keep rate from `balance`, a margin away.

    `balance` is the keep rate at which there is no gap: eval scale / train scale. The gap may lie
    on either side, so both rates are tried, and the larger number counts.
    """
    numbers = []
    for rate in [rate for rate in (keep_rate, balance) if 0.0 < rate <= 1.0] or [0.5]:
        relative_margin = margin(1 - rate)
        # To the nearer of the two rates that lie a margin away, less what is negligible.
        shift = (1 - NEGLIGIBLE) * rate * relative_margin / (1 + relative_margin)
        lower, higher = max(rate - shift, 0.0), min(rate + shift, 1.0)
        variance = max(r * (1 - r) for r in (rate, lower, higher))
        numbers.append(draws_needed(variance, shift, alpha=alpha))
    return max(numbers)


def draws_needed(variance: float, shift: float, *, alpha: float) -> int:
    """The number of draws whose mean shows a shift, at level `alpha`.

    `variance` is that of a single draw.
    """
    quantiles = float(stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(_POWER))
    return math.ceil(quantiles**2 * variance / shift**2)


def exact_interval(kept_count: int, group_count: int, *, alpha: float) -> Interval:
    """Clopper and Pearson's interval of the keep rate, at level `alpha`."""
    dropped_count = group_count - kept_count
    low, high = 0.0, 1.0
    if kept_count:
        low = float(stats.beta.ppf(alpha / 2, kept_count, dropped_count + 1))
    if dropped_count:
        high = float(stats.beta.ppf(1 - alpha / 2, kept_count + 1, dropped_count))
    return low, high


def exact_p(kept_count: int, group_count: int, balance: Interval) -> float:
    """The p-value of the two-sided exact binomial test that the keep rate lies in `balance`.

    The interval is as wide as the rounding of the scales that it was computed from.
    """
    if balance[0] > 1.0:
        return 0.0  # no keep rate makes up for such scales
    low, high = (min(max(end, 0.0), 1.0) for end in balance)
    keep_rate = kept_count / group_count
    if low <= keep_rate <= high:
        return 1.0
    nearest = low if keep_rate < low else high
    return float(stats.binomtest(kept_count, group_count, nearest).pvalue)


def mean_interval(values: Sequence[float], *, alpha: float) -> Interval:
    """Student's interval of the mean at level `alpha`, from at least two independent draws."""
    sample = np.asarray(values, dtype=np.float64)
    half = float(
        stats.t.ppf(1 - alpha / 2, sample.size - 1) * sample.std(ddof=1) / math.sqrt(sample.size)
    )
    return float(sample.mean()) - half, float(sample.mean()) + half


def overdispersed(kept_counts: Sequence[int], group_counts: Sequence[int]) -> bool:
    """Whether counts spread wider than those of independent groups do.

    Each draw has a count of its groups and of those that it keeps. The chi-square test gives a
    false alarm once in 10,000.
    """
    counts = np.asarray(kept_counts, dtype=np.float64)
    sizes = np.asarray(group_counts, dtype=np.float64)
    rate = counts.sum() / sizes.sum()
    if rate in (0.0, 1.0) or counts.size < 2:
        return False
    statistic = float((((counts - sizes * rate) ** 2) / (sizes * rate * (1 - rate))).sum())
    return bool(statistic > stats.chi2.ppf(1 - 1e-4, counts.size - 1))
