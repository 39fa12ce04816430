from __future__ import annotations

import pytest
from scipy import stats

from evalmode.export.audit import statistics


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.99])
def test_the_sample_size_is_that_of_the_formula(keep: float) -> None:
    alpha, d = 0.01 / 3, max(1 - keep, 0.02)
    z = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(0.99)
    formula = z**2 * keep * (1 - keep) / (d * keep / 4) ** 2
    # Never fewer than the formula's, and at most 2.6 times as many, for the less favourable of the
    # two rates.
    assert formula <= statistics.masks_needed(keep, keep, alpha=alpha) <= 2.6 * formula


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.9, 0.98, 0.995])
@pytest.mark.parametrize("side", [-1, 1])
def test_the_sample_size_finds_a_gap_of_one_margin_99_times_in_100(keep: float, side: int) -> None:
    alpha = 0.01 / 3
    balance = keep / (1 + side * statistics.margin(1 - keep))
    if balance > 1:
        assert statistics.exact_p(990, 1000, (balance, balance)) == 0.0
        return
    groups = statistics.masks_needed(keep, balance, alpha=alpha)
    # 99 counts in 100 lie farther out
    nearest = int(stats.binom.ppf(0.01 if keep > balance else 0.99, groups, keep))
    assert statistics.exact_p(nearest, groups, (balance, balance)) < alpha


@pytest.mark.parametrize(
    ("kept_count", "group_count"), [(0, 20), (20, 20), (7, 20), (9_000, 10_000)]
)
def test_the_interval_is_clopper_and_pearsons(kept_count: int, group_count: int) -> None:
    expected = stats.binomtest(kept_count, group_count).proportion_ci(0.99, method="exact")
    assert statistics.exact_interval(kept_count, group_count, alpha=0.01) == pytest.approx(
        (expected.low, expected.high)
    )


def test_false_alarms_of_the_exact_test_are_at_most_alpha() -> None:
    groups, keep, alpha = 500, 0.9, 0.01
    alarms = sum(
        stats.binom.pmf(count, groups, keep)
        for count in range(groups + 1)
        if statistics.exact_p(count, groups, (keep, keep)) < alpha
    )
    assert alarms <= alpha


def test_a_rate_inside_the_rounding_of_its_scales_is_no_gap() -> None:
    assert statistics.exact_p(901, 1000, (0.9, 0.902)) == 1.0


def test_a_keep_rate_above_one_is_impossible() -> None:
    assert statistics.exact_p(10, 10, (1.1, 1.1)) == 0.0


def test_dependent_counts_are_overdispersed_and_independent_counts_are_not() -> None:
    independent = stats.binom.rvs(1000, 0.8, size=32, random_state=0).tolist()
    dependent = (10 * stats.binom.rvs(100, 0.8, size=32, random_state=0)).tolist()
    assert not statistics.overdispersed(independent, [1000] * 32)
    assert statistics.overdispersed(dependent, [1000] * 32)
    assert not statistics.overdispersed([1000] * 32, [1000] * 32)


def test_students_interval_is_scipys() -> None:
    values = stats.norm.rvs(size=40, random_state=0).tolist()
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.99)
    assert statistics.mean_interval(values, alpha=0.01) == pytest.approx(
        (expected.low, expected.high)
    )
