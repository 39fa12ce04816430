"""Measuring one effect: how many draws it takes, the draws, and what they say about its mean.

A mask is judged by an exact binomial test of the groups that it keeps. Where neighbours or whole
draws hang together (DropBlock), and for noise that is no mask, the draws' means are judged instead,
by Student's interval against a margin. The draws that find the structure are not those that are
tested. Knows an observer, no module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from evalmode.export.audit import masks
from evalmode.export.audit import statistics as st
from evalmode.export.audit.agreement import agreement
from evalmode.export.audit.site import MOST_DRAWS, Effect, Kind, Measured, NoiseObserver, Outcome

_PILOT = 8  # draws at least, in the pilot and in the test
_MOST_PILOT = 512
_ENOUGH = 20  # groups kept, and dropped, that a pilot should see
_MOST_ELEMENTS = 200_000  # of a pilot that has still not seen them


@dataclass
class _Pilot:
    """What draws before the test showed of one effect."""

    noises: list[Tensor]
    value: float | None
    shape: masks.Shape | None
    clustered: bool

    @property
    def frozen(self) -> bool:
        """Whether every draw was the same although it dropped one element and kept another."""
        first = self.noises[0]
        mixed = bool((first == 0).any()) and bool((first.nan_to_num(0.0) != 0).any())
        return mixed and all(
            torch.equal(first.nan_to_num(-1.0), other.nan_to_num(-1.0)) for other in self.noises[1:]
        )


def measure(observer: NoiseObserver, *, alpha: float, draws: int | None) -> list[Measured]:
    """Every effect's figures, at level alpha each. `draws` fixes the number of test forwards; None
    sizes it.
    """
    return [
        _measure(observer, index, effect, alpha, draws)
        for index, effect in enumerate(observer.effects)
    ]


def _measure(
    observer: NoiseObserver, index: int, effect: Effect, alpha: float, draws: int | None
) -> Measured:
    if effect.direction is not None:
        return agreement(
            partial(_drawn, observer, index), effect.direction, alpha=alpha, draws=draws
        )
    if effect.law is Kind.AUGMENTED:
        return _augmented(observer, index)
    pilot = _pilot(observer, index, effect)
    if pilot.frozen:
        return Measured(outcome=Outcome.FROZEN, draws=len(pilot.noises), value=pilot.value)
    if not any(bool(noise.nan_to_num(0.0).any()) for noise in pilot.noises):
        return Measured(outcome=Outcome.NOTHING_KEPT, draws=len(pilot.noises), keep=0.0, gap=0.0)
    for _ in range(3):
        if pilot.shape is None or pilot.clustered:
            break
        measured = _test_mask(observer, index, effect, pilot, alpha, draws)
        if measured is not None:
            return measured
    return _test_mean(observer, index, effect, pilot, alpha, draws)


def _pilot(observer: NoiseObserver, index: int, effect: Effect) -> _Pilot:
    noises: list[Tensor] = []
    for noise in _drawn(observer, index, _MOST_PILOT):
        noises.append(noise)
        if len(noises) >= _PILOT and (
            _informative(noises) or sum(n.numel() for n in noises) > _MOST_ELEMENTS
        ):
            break
    seen = torch.cat([noise.reshape(-1) for noise in noises])
    value = None if effect.additive else masks.kept_value(seen, rounding=effect.rounding)
    alike = len({noise.shape for noise in noises}) == 1
    if value is None or not alike:
        return _Pilot(noises, value, None, clustered=True)
    shape = masks.shape_of(noises[0], value)
    for noise in noises[1:]:
        shape = shape.joined(masks.shape_of(noise, value))
    return _Pilot(noises, value, shape, _hang_together(noises, shape))


def _augmented(observer: NoiseObserver, index: int) -> Measured:
    """How much is left as it is; there is no scale to test."""
    shares = [float((noise != 0).double().mean()) for noise in _drawn(observer, index, 4 * _PILOT)]
    return Measured(outcome=Outcome.NONE, draws=len(shares), keep=sum(shares) / len(shares))


def _informative(noises: list[Tensor]) -> bool:
    zeros = sum(int((noise == 0).sum()) for noise in noises)
    return (
        zeros >= _ENOUGH
        and sum(int((noise.nan_to_num(0.0) != 0).sum()) for noise in noises) >= _ENOUGH
    )


def _hang_together(noises: list[Tensor], shape: masks.Shape) -> bool:
    pairs = [masks.groups(noise, shape) for noise in noises]
    if st.overdispersed(
        [int(kept.sum()) for _, kept in pairs], [int(seen.sum()) for seen, _ in pairs]
    ):
        return True
    return masks.neighbours_agree([seen for seen, _ in pairs], [kept for _, kept in pairs])


def _drawn(observer: NoiseObserver, index: int, count: int) -> Iterator[Tensor]:
    for _ in range(count):
        yield observer.draw()[index].to(torch.float64)


def _test_mask(
    observer: NoiseObserver,
    index: int,
    effect: Effect,
    pilot: _Pilot,
    alpha: float,
    draws: int | None,
) -> Measured | None:
    """The exact test; None when the draws showed another structure than the pilot, which is then
    corrected.
    """
    value, shape = pilot.value, pilot.shape
    assert value is not None
    assert shape is not None
    counts = [masks.groups(noise, shape) for noise in pilot.noises]
    each = max(sum(int(seen.sum()) for seen, _ in counts) / len(counts), 1e-9)
    rate = sum(int(kept.sum()) for _, kept in counts) / max(
        sum(int(seen.sum()) for seen, _ in counts), 1
    )
    needed = st.masks_needed(rate, effect.balance / value, alpha=alpha)
    count = draws or min(max(-(-needed // max(int(each), 1)), _PILOT), MOST_DRAWS)
    kept, groups, now = [], [], shape
    for noise in _drawn(observer, index, count):
        if not masks.fits(noise, value, rounding=effect.rounding):
            pilot.clustered = True
            return None
        now = now.joined(masks.shape_of(noise, value))
        seen, held = masks.groups(noise, shape)
        kept.append(int(held.sum()))
        groups.append(int(seen.sum()))
    if now.shared != shape.shared:
        pilot.shape = now
        return None
    if st.overdispersed(kept, groups):
        pilot.clustered = True
        return None
    return _mask_figures(
        effect, value, sum(kept), sum(groups), alpha, count, enough=sum(groups) >= needed
    )


def _mask_figures(
    effect: Effect, value: float, kept: int, groups: int, alpha: float, draws: int, *, enough: bool
) -> Measured:
    low, high = st.exact_interval(kept, groups, alpha=alpha)
    ratio = value / effect.balance if effect.balance > 0 else float("inf")
    near = st.margin(1 - kept / groups)
    slack = effect.rounding + st.NEGLIGIBLE * near
    p_value = st.exact_p(kept, groups, ((1 - slack) / ratio, (1 + slack) / ratio))
    gap, interval = kept / groups * ratio, (low * ratio, high * ratio)
    if p_value < alpha:
        outcome = Outcome.GAP
    else:
        sure = enough or (1 - near <= interval[0] and interval[1] <= 1 + near)
        outcome = Outcome.NONE if sure else Outcome.UNSURE
    return Measured(
        outcome=outcome,
        draws=draws,
        value=value,
        keep=kept / groups,
        keep_interval=(low, high),
        gap=gap,
        gap_interval=interval,
    )


def _test_mean(
    observer: NoiseObserver,
    index: int,
    effect: Effect,
    pilot: _Pilot,
    alpha: float,
    draws: int | None,
) -> Measured:
    """Student's interval of the draws' means, against balance, within a margin."""
    every = torch.cat([noise.reshape(-1) for noise in pilot.noises])
    spread = float(every[~every.isnan()].std()) if every.numel() > 1 else 0.0
    means = [float(noise.nanmean()) for noise in pilot.noises]
    if effect.additive:
        near = 0.05 * spread  # a bias below a twentieth of the noise
    else:
        relative = (spread / effect.balance) ** 2 if effect.balance else 0.0
        # for a mask this is 1 - keep
        near = abs(effect.balance) * st.margin(relative / (1 + relative))
    variance = float(torch.tensor(means, dtype=torch.float64).var())
    needed = st.draws_needed(variance, near, alpha=alpha) if near else 0
    count = draws or min(max(needed, 4 * _PILOT), MOST_DRAWS)
    sample = [float(noise.nanmean()) for noise in _drawn(observer, index, max(count, 2))]
    return _mean_figures(effect, pilot, sample, near, alpha)


def _mean_figures(
    effect: Effect, pilot: _Pilot, sample: list[float], near: float, alpha: float
) -> Measured:
    low, high = st.mean_interval(sample, alpha=alpha)
    mean, balance = sum(sample) / len(sample), effect.balance
    slack = abs(balance) * effect.rounding + st.NEGLIGIBLE * near
    if balance - near <= low and high <= balance + near:
        outcome = Outcome.NONE
    elif high < balance - slack or low > balance + slack:
        outcome = Outcome.GAP
    else:
        outcome = Outcome.UNSURE
    ratio = 1 / balance if balance else None
    keep = None if pilot.value is None else mean / pilot.value
    return Measured(
        outcome=outcome,
        draws=len(sample),
        value=pilot.value,
        keep=keep,
        keep_interval=None if pilot.value is None else (low / pilot.value, high / pilot.value),
        gap=None if ratio is None else mean * ratio,
        gap_interval=None if ratio is None else (low * ratio, high * ratio),
    )
