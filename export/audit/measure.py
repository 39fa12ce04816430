"""Measuring the effects of a site: how many draws a test takes, the draws, and what they prove.

One effect is measured in this order:

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

from evalmode.export.audit import masks
from evalmode.export.audit import statistics as st
from evalmode.export.audit.agreement import compare_means
from evalmode.export.audit.site import MOST_DRAWS, Effect, Figures, Kind, NoiseObserver, Outcome

# Draws of a pilot, and of a test, at least and at most.
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
    """What the draws before the test showed.

    `kept_value` is None for noise that is no mask. `shape` is None for noise that is no mask of
    independent groups.
    """

    noises: list[Tensor]
    kept_value: float | None
    shape: masks.Shape | None


def measure(observer: NoiseObserver, *, alpha: float, draws: int | None) -> list[Figures]:
    """The figures of each effect of an observer, each at level `alpha`.

    `draws` fixes the training forwards of each test. None takes as many as detect a gap of one
    margin (see `statistics.margin`), and `MOST_DRAWS` at most.
    """
    return [
        _measure_effect(
            _Test(observer=observer, index=index, effect=effect, alpha=alpha, draws=draws)
        )
        for index, effect in enumerate(observer.effects)
    ]


def _measure_effect(test: _Test) -> Figures:
    effect = test.effect

    # 1. Noise of no known form.
    if effect.direction is not None:
        return compare_means(test.noises, effect.direction, alpha=test.alpha, draws=test.draws)

    # 2. Augmentation.
    if effect.pattern is Kind.AUGMENTED:
        shares = [float((noise != 0).double().mean()) for noise in test.noises(_LEAST_MEANS)]
        keep_rate = sum(shares) / len(shares)
        return Figures(outcome=Outcome.NO_GAP, draws=len(shares), keep_rate=keep_rate)

    # 3. The structure of the noise.
    pilot = _draw_pilot(test)
    draws = len(pilot.noises)
    first, *others = pilot.noises
    drops_and_keeps = bool((first == 0).any()) and bool((first.nan_to_num(0.0) != 0).any())
    # NaN is not equal to itself, and -1 is no value of a mask.
    if drops_and_keeps and all(
        torch.equal(first.nan_to_num(-1.0), noise.nan_to_num(-1.0)) for noise in others
    ):
        return Figures(outcome=Outcome.FROZEN, draws=draws, kept_value=pilot.kept_value)
    if not any(bool(noise.nan_to_num(0.0).any()) for noise in pilot.noises):
        return Figures(outcome=Outcome.NOTHING_KEPT, draws=draws, keep_rate=0.0, gap=0.0)

    # 4. A mask of independent groups. A test may refute the structure that the pilot showed.
    shape = pilot.shape
    for _ in range(_MASK_TESTS):
        if shape is None or pilot.kept_value is None:
            break
        result = _test_mask(test, pilot.noises, pilot.kept_value, shape)
        if isinstance(result, Figures):
            return result
        shape = result

    # 5. Anything else.
    return _test_mean(test, pilot)


def _draw_pilot(test: _Test) -> _Pilot:
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

    value = None
    if not effect.additive:
        elements = torch.cat([noise.reshape(-1) for noise in noises])
        value = masks.kept_value(elements, rounding=effect.rounding)
    has_one_shape = len({noise.shape for noise in noises}) == 1
    if value is None or not has_one_shape:
        return _Pilot(noises=noises, kept_value=value, shape=None)

    shape = masks.shape_of(noises[0], value)
    for noise in noises[1:]:
        shape = shape.joined(masks.shape_of(noise, value))
    is_visible, is_kept = zip(*(masks.groups(noise, shape) for noise in noises), strict=True)
    kept_counts = [int(tensor.sum()) for tensor in is_kept]
    visible_counts = [int(tensor.sum()) for tensor in is_visible]
    is_overdispersed = st.overdispersed(kept_counts, visible_counts)
    if is_overdispersed or masks.neighbours_agree(is_visible, is_kept):
        return _Pilot(noises=noises, kept_value=value, shape=None)
    return _Pilot(noises=noises, kept_value=value, shape=shape)


def _test_mask(
    test: _Test, pilot_noises: list[Tensor], value: float, shape: masks.Shape
) -> Figures | masks.Shape | None:
    """The exact test of a mask with independent groups.

    Where the draws refute that, the test is void. Returned is then the shape that they show, or
    None where their groups depend on one another.
    """
    effect, alpha = test.effect, test.alpha

    # The number of draws, from the pilot's keep rate.
    visible_count = kept_count = 0
    for noise in pilot_noises:
        is_visible, is_kept = masks.groups(noise, shape)
        visible_count += int(is_visible.sum())
        kept_count += int(is_kept.sum())
    rate = kept_count / max(visible_count, 1)
    needed = st.masks_needed(rate, effect.balance / value, alpha=alpha)
    groups_per_draw = max(visible_count // len(pilot_noises), 1)
    draws = test.draws
    if draws is None:
        # -(-a // b) is a / b, rounded up.
        draws = min(max(-(-needed // groups_per_draw), _LEAST_DRAWS), MOST_DRAWS)

    # The draws.
    kept_counts: list[int] = []
    visible_counts: list[int] = []
    shape_of_draws = shape
    for noise in test.noises(draws):
        if not masks.fits(noise, value, rounding=effect.rounding):
            return None
        shape_of_draws = shape_of_draws.joined(masks.shape_of(noise, value))
        is_visible, is_kept = masks.groups(noise, shape)
        kept_counts.append(int(is_kept.sum()))
        visible_counts.append(int(is_visible.sum()))
    if shape_of_draws.shared != shape.shared:
        return shape_of_draws
    if st.overdispersed(kept_counts, visible_counts):
        return None

    # The test. There is no gap at the keep rate balance / value, and a gap of less than the slack
    # counts as none.
    kept_count, group_count = sum(kept_counts), sum(visible_counts)
    keep_rate = kept_count / group_count
    low, high = st.exact_interval(kept_count, group_count, alpha=alpha)
    ratio = value / effect.balance if effect.balance > 0 else float("inf")
    margin = st.margin(1 - keep_rate)
    slack = effect.rounding + st.NEGLIGIBLE * margin
    balanced_rates = ((1 - slack) / ratio, (1 + slack) / ratio)
    p_value = st.exact_p(kept_count, group_count, balanced_rates)
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
        draws=draws,
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
        margin = abs(balance) * st.margin(drop_rate)

    # The number of draws, from the variance of the pilot's means.
    pilot_means = [float(noise.nanmean()) for noise in pilot.noises]
    variance = float(torch.tensor(pilot_means, dtype=torch.float64).var())
    needed = st.draws_needed(variance, margin, alpha=alpha) if margin else 0
    draws = test.draws
    if draws is None:
        draws = min(max(needed, _LEAST_MEANS), MOST_DRAWS)
    means = [float(noise.nanmean()) for noise in test.noises(max(draws, 2))]

    low, high = st.mean_interval(means, alpha=alpha)
    mean = sum(means) / len(means)
    slack = abs(balance) * effect.rounding + st.NEGLIGIBLE * margin
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
        draws=len(means),
        kept_value=pilot.kept_value,
        keep_rate=keep_rate,
        keep_interval=keep_interval,
        gap=gap,
        gap_interval=gap_interval,
    )
