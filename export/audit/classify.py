"""From figures to a kind: the mistake, or the dropout, that explains a train scale, an eval scale and a rate.

Knows numbers only.
"""

from __future__ import annotations

from evalmode.export.audit.effect import Effect
from evalmode.export.audit.measured import Measured, Outcome
from evalmode.export.audit.site import Kind

# Names, not verdicts: how near a scale must be to a formula to be called by it.
_NEAR = 1e-3


def scales(effect: Effect, measured: Measured) -> tuple[float | None, float | None]:
    """The train scale of what is kept and the eval scale, as a user sees them; None for what is not a mask."""
    if effect.additive or effect.law is not None or measured.value is None:
        return None, None
    return measured.value * effect.scale, effect.balance * effect.scale


def kind_of(effect: Effect, measured: Measured, p: float | None) -> Kind:
    """The kind of a measured effect; `p` is the declared drop rate where there is one."""
    special = {
        Outcome.UNSURE: Kind.INCONCLUSIVE,
        Outcome.FROZEN: Kind.FROZEN,
        Outcome.NOTHING_KEPT: Kind.DROPS_ALL,
    }
    if measured.outcome in special:
        return special[measured.outcome]
    if effect.law is not None:
        return Kind.WRONG_SCALE if effect.why or measured.outcome is Outcome.GAP else effect.law
    if effect.direction is not None:
        return Kind.UNBIASED
    s, e = scales(effect, measured)
    if measured.outcome is Outcome.NONE:
        if s is None or e is None:
            return Kind.ADDITIVE if effect.additive else Kind.MULTIPLICATIVE
        return Kind.CLASSIC if _near(s, 1) and not _near(e, 1) else Kind.INVERTED
    if s is None or e is None or measured.keep is None:
        return Kind.WRONG_SCALE
    return mistake(s, e, measured.keep, measured.keep_interval or (measured.keep, measured.keep), p)


def mistake(s: float, e: float, keep: float, interval: tuple[float, float], p: float | None) -> Kind:
    """The name of a gap, by the ratio s / e that training and eval have, which at keep rate k should be 1 / k.

    Nothing scaled: s / e = 1. Twice: 1 / k^2. Any other ratio above 1 belongs to another rate. k is the declared rate's
    where the measured interval holds it, else the measured.
    """
    ratio = s / e if e else float("inf")
    if _near(ratio, 1):
        return Kind.UNSCALED
    declared = p is not None and interval[0] <= 1 - p <= interval[1]
    k = 1 - p if declared and p is not None else keep
    slack = _NEAR if declared else max(_NEAR, 2 * (interval[1] - interval[0]) / keep)
    if abs(ratio * k * k - 1) <= slack:
        return Kind.SCALED_TWICE
    return Kind.WRONG_RATE if ratio > 1 else Kind.WRONG_SCALE


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= _NEAR * abs(b)
