"""Measuring the effects of a site: how many draws a test takes, the draws, and what they prove.

A draw is the noise of one training forward. One effect is measured in this order:

1. noise of no known form: the mean of the whole output is compared (`agreement.py`);
2. augmentation: the share of values that stay as they are; there is no scale to test;
3. pilot draws show the structure of the noise; if they are all the same mask, it is frozen, and if
   they keep nothing, it drops everything;
4. a mask of independent groups: an exact binomial test of the groups that it keeps;
5. a mask whose groups depend on one another (DropBlock), and noise that is no mask: Student's
   interval of the means of whole draws, against a margin.

The draws that show the structure are not those that are tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from evalmode.export.audit import masks, statistics
from evalmode.export.audit.agreement import compare_means
from evalmode.export.audit.site import MOST_DRAWS, Effect, Figures, Kind, NoiseObserver, Outcome

# A pilot and a test take this many draws at least, and a pilot at most.
_LEAST_DRAWS = 8
_MOST_PILOT_DRAWS = 512
# A pilot ends when it has seen this many elements kept and this many dropped, or after so many
# elements in all.
_ENOUGH_ELEMENTS = 20
_MOST_PILOT_ELEMENTS = 200_000
# Means vary less evenly than groups of a mask: their test takes this many draws at least.
_LEAST_MEANS = 4 * _LEAST_DRAWS
# The tests of a mask. The second and third follow where the test before showed another structure.
_MASK_TESTS = 3


@dataclass(frozen=True, kw_only=True)
class _Test:
    """What is tested, and how strictly. `draws` fixes the number of draws; None sizes it."""

    observer: NoiseObserver
    index: int
    effect: Effect
    alpha: float
    draws: int | None

    def noises(self, count: int) -> Iterator[Tensor]:
        """The noise of `count` more forwards, in float64."""
        for _ in range(count):
            yield self.observer.draw()[self.index].to(torch.float64)


@dataclass(frozen=True, kw_only=True)
class _Pilot:
    """The draws before the test, and the structure that they showed.

    `kept_value` is None for noise that is no mask. `mask_pattern` is None unless it is a mask of
    independent groups.
    """

    noises: list[Tensor]
    kept_value: float | None
    mask_pattern: masks.MaskPattern | None = None


def measure(observer: NoiseObserver, *, alpha: float, draws: int | None) -> list[Figures]:
    """The figures of each effect of an observer, each at level `alpha`.

    `draws` fixes the training forwards of each test. None takes as many as detect a gap of one
    margin (see `statistics.margin`), and `MOST_DRAWS` at most.
    """
    all_figures = []
    for index, effect in enumerate(observer.effects):
        test = _Test(observer=observer, index=index, effect=effect, alpha=alpha, draws=draws)
        all_figures.append(_measure_effect(test))
    return all_figures


def _measure_effect(test: _Test) -> Figures:
    effect = test.effect

    # 1. Noise of no known form.
    if effect.direction is not None:
        return compare_means(test.noises, effect.direction, alpha=test.alpha, draws=test.draws)

    # 2. Augmentation.
    if effect.pattern is Kind.AUGMENTED:
        shares = [float((noise != 0).double().mean()) for noise in test.noises(_LEAST_MEANS)]
        keep_rate = sum(shares) / len(shares)
        return Figures(outcome=Outcome.NO_GAP, forward_count=len(shares), keep_rate=keep_rate)

    # 3. The structure of the noise.
    pilot = _draw_pilot(test)
    forward_count = len(pilot.noises)
    first, *others = pilot.noises
    is_frozen = bool((first == 0).any()) and bool((first.nan_to_num(0.0) != 0).any())
    for noise in others:
        # NaN is not equal to itself, and -1 is no value of a mask.
        is_frozen = is_frozen and torch.equal(first.nan_to_num(-1.0), noise.nan_to_num(-1.0))
    if is_frozen:
        return Figures(
            outcome=Outcome.FROZEN, forward_count=forward_count, kept_value=pilot.kept_value
        )
    if not any(bool(noise.nan_to_num(0.0).any()) for noise in pilot.noises):
        return Figures(
            outcome=Outcome.NOTHING_KEPT, forward_count=forward_count, keep_rate=0.0, gap=0.0
        )

    # 4. A mask of independent groups. A test may refute the structure that the pilot showed, and
    # return another pattern to test, or None.
    mask_pattern = pilot.mask_pattern
    for _ in range(_MASK_TESTS):
        if mask_pattern is None:
            break
        result = _test_mask(test, pilot.noises, mask_pattern)
        if isinstance(result, Figures):
            return result
        mask_pattern = result

    # 5. Anything else.
    return _test_mean(test, pilot)


def _draw_pilot(test: _Test) -> _Pilot:
    """Draw until masks have shown enough elements kept and dropped, and read their structure."""
    effect = test.effect
    noises: list[Tensor] = []
    zero_count = kept_count = element_count = 0
    for noise in test.noises(_MOST_PILOT_DRAWS):
        noises.append(noise)
        zero_count += int((noise == 0).sum())
        kept_count += int((noise.nan_to_num(0.0) != 0).sum())
        element_count += noise.numel()
        has_seen_both = min(zero_count, kept_count) >= _ENOUGH_ELEMENTS
        if len(noises) >= _LEAST_DRAWS and (has_seen_both or element_count > _MOST_PILOT_ELEMENTS):
            break

    # A mask: every draw is 0 or one value.
    value = None
    if not effect.additive:
        elements = torch.cat([noise.reshape(-1) for noise in noises])
        value = masks.kept_value(elements, rounding=effect.rounding)
    has_one_shape = len({noise.shape for noise in noises}) == 1
    if value is None or not has_one_shape:
        return _Pilot(noises=noises, kept_value=value)

    # Its groups: the elements that are kept or dropped together.
    mask_pattern = masks.pattern_of(noises[0], value)
    for noise in noises[1:]:
        mask_pattern = mask_pattern.joined(masks.pattern_of(noise, value))

    # Whether the groups are independent.
    visible_groups, kept_groups = [], []
    for noise in noises:
        is_visible, is_kept = masks.groups(noise, mask_pattern)
        visible_groups.append(is_visible)
        kept_groups.append(is_kept)
    kept_counts = [int(is_kept.sum()) for is_kept in kept_groups]
    visible_counts = [int(is_visible.sum()) for is_visible in visible_groups]
    if statistics.overdispersed(kept_counts, visible_counts):
        return _Pilot(noises=noises, kept_value=value)
    if masks.neighbours_agree(visible_groups, kept_groups):
        return _Pilot(noises=noises, kept_value=value)
    return _Pilot(noises=noises, kept_value=value, mask_pattern=mask_pattern)


def _test_mask(
    test: _Test, pilot_noises: list[Tensor], mask_pattern: masks.MaskPattern
) -> Figures | masks.MaskPattern | None:
    """The exact test of a mask with independent groups of this pattern.

    The draws of the test may refute the pattern, and the test is then void. The result is the
    pattern that they show instead, or None where their groups depend on one another.
    """
    effect, alpha, value = test.effect, test.alpha, mask_pattern.value

    # The number of draws, from the pilot's keep rate.
    visible_count = kept_count = 0
    for noise in pilot_noises:
        is_visible, is_kept = masks.groups(noise, mask_pattern)
        visible_count += int(is_visible.sum())
        kept_count += int(is_kept.sum())
    rate = kept_count / max(visible_count, 1)
    needed = statistics.masks_needed(rate, effect.balance / value, alpha=alpha)
    groups_per_draw = max(visible_count // len(pilot_noises), 1)
    draws = test.draws
    if draws is None:
        # -(-a // b) is a / b, rounded up.
        draws = min(max(-(-needed // groups_per_draw), _LEAST_DRAWS), MOST_DRAWS)

    # The draws.
    kept_counts: list[int] = []
    visible_counts: list[int] = []
    pattern_of_draws = mask_pattern
    for noise in test.noises(draws):
        if not masks.fits(noise, value, rounding=effect.rounding):
            return None
        pattern_of_draws = pattern_of_draws.joined(masks.pattern_of(noise, value))
        is_visible, is_kept = masks.groups(noise, mask_pattern)
        kept_counts.append(int(is_kept.sum()))
        visible_counts.append(int(is_visible.sum()))
    if pattern_of_draws.shared != mask_pattern.shared:
        return pattern_of_draws
    if statistics.overdispersed(kept_counts, visible_counts):
        return None

    # The test. There is no gap at the keep rate balance / value, and a gap of less than the slack
    # counts as none.
    kept_count, group_count = sum(kept_counts), sum(visible_counts)
    keep_rate = kept_count / group_count
    low, high = statistics.exact_interval(kept_count, group_count, alpha=alpha)
    ratio = value / effect.balance if effect.balance > 0 else float("inf")
    margin = statistics.margin(1 - keep_rate)
    slack = effect.rounding + statistics.NEGLIGIBLE * margin
    balanced_rates = ((1 - slack) / ratio, (1 + slack) / ratio)
    p_value = statistics.exact_p(kept_count, group_count, balanced_rates)
    gap, gap_interval = keep_rate * ratio, (low * ratio, high * ratio)
    if p_value < alpha:
        outcome = Outcome.GAP
    elif group_count >= needed:
        # So many groups would have shown a gap of one margin.
        outcome = Outcome.NO_GAP
    elif 1 - margin <= gap_interval[0] and gap_interval[1] <= 1 + margin:
        outcome = Outcome.NO_GAP
    else:
        outcome = Outcome.UNSURE
    return Figures(
        outcome=outcome,
        forward_count=draws,
        kept_value=value,
        keep_rate=keep_rate,
        keep_interval=(low, high),
        gap=gap,
        gap_interval=gap_interval,
    )


def _test_mean(test: _Test, pilot: _Pilot) -> Figures:
    """Student's interval of the means of whole draws, against the balance, within a margin."""
    effect, alpha, balance = test.effect, test.alpha, test.effect.balance

    # The margin, from the spread of the noise.
    elements = torch.cat([noise.reshape(-1) for noise in pilot.noises])
    spread = float(elements[~elements.isnan()].std()) if elements.numel() > 1 else 0.0
    if effect.additive:
        margin = 0.05 * spread  # a bias below a twentieth of the noise is not visible beside it
    else:
        relative_variance = (spread / balance) ** 2 if balance else 0.0
        # For a mask this is the drop rate; other noise gets the margin of a mask of its variance.
        drop_rate = relative_variance / (1 + relative_variance)
        margin = abs(balance) * statistics.margin(drop_rate)

    # The number of draws, from the variance of the pilot's means.
    pilot_means = [float(noise.nanmean()) for noise in pilot.noises]
    variance = float(torch.tensor(pilot_means, dtype=torch.float64).var())
    needed = statistics.draws_needed(variance, margin, alpha=alpha) if margin else 0
    draws = test.draws
    if draws is None:
        draws = min(max(needed, _LEAST_MEANS), MOST_DRAWS)
    means = [float(noise.nanmean()) for noise in test.noises(max(draws, 2))]

    low, high = statistics.mean_interval(means, alpha=alpha)
    mean = sum(means) / len(means)
    slack = abs(balance) * effect.rounding + statistics.NEGLIGIBLE * margin
    if balance - margin <= low and high <= balance + margin:
        outcome = Outcome.NO_GAP
    elif high < balance - slack or low > balance + slack:
        outcome = Outcome.GAP
    else:
        outcome = Outcome.UNSURE

    keep_rate, keep_interval = None, None
    if pilot.kept_value is not None:
        keep_rate = mean / pilot.kept_value
        keep_interval = (low / pilot.kept_value, high / pilot.kept_value)
    gap, gap_interval = None, None
    if balance:
        ratio = 1 / balance
        gap, gap_interval = mean * ratio, (low * ratio, high * ratio)
    return Figures(
        outcome=outcome,
        forward_count=len(means),
        kept_value=pilot.kept_value,
        keep_rate=keep_rate,
        keep_interval=keep_interval,
        gap=gap,
        gap_interval=gap_interval,
    )
