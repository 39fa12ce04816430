"""From figures to a verdict: the kind of a site, and how the audit reports each kind.

`REPORTS` is the table of what the audit prints for each kind. `name_kind` chooses the kind of a
measured effect.
"""

from __future__ import annotations

from dataclasses import dataclass

from evalmode.bundle.certificate import Severity
from evalmode.export.audit.site import Effect, Figures, Interval, Kind, Outcome

# A scale has the name of a formula when it is this close to it, relatively. This decides names
# alone: whether there is a gap is decided by the tests in `measure.py`.
_NAME_TOLERANCE = 1e-3

_CONVENTION = "papers often call the keep probability p, PyTorch's p is the drop probability"
REACH_FIX = "give samples that reach it"


@dataclass(frozen=True, kw_only=True)
class KindReport:
    """How one kind is reported. Severity None: no finding, only a line of the table.

    `sentence` and `fix` are templates; `sentence` and `fix` below fill in their fields.
    """

    severity: Severity | None = None
    sentence: str
    fix: str = ""


REPORTS: dict[Kind, KindReport] = {
    Kind.INVERTED: KindReport(
        sentence="training scales what it keeps up, eval changes nothing: the means agree",
    ),
    Kind.CLASSIC: KindReport(
        sentence="training keeps values as they are, eval scales them down: the means agree",
    ),
    Kind.ALPHA: KindReport(
        sentence="mean and variance of a standard normal input stay what they are",
    ),
    Kind.MULTIPLICATIVE: KindReport(
        sentence="training multiplies by noise whose mean is eval's factor",
    ),
    Kind.ADDITIVE: KindReport(
        sentence="training adds noise whose mean is what eval adds",
    ),
    Kind.UNBIASED: KindReport(
        sentence="what it returns in training is, on average, what it returns in eval",
    ),
    # LayerDrop and augmentation differ on average because they are meant to: a warning.
    Kind.AUGMENTED: KindReport(
        severity=Severity.WARNING,
        sentence=(
            "in training it masks or replaces {dropped_share} of its values, in eval none: this is"
            " meant as augmentation, and no scale makes up for it"
        ),
        fix="nothing, if augmentation is meant; a dropout divides what it keeps by 1 - p",
    ),
    Kind.LAYERS_SKIPPED: KindReport(
        severity=Severity.WARNING,
        sentence=(
            "in training it skips layers with p = {skip_rate} and scales nothing for it, as"
            " LayerDrop does: on average a layer adds less in training than in eval"
        ),
        fix=(
            "nothing, if LayerDrop is meant (arXiv:1909.11556); else divide what a layer adds by"
            " 1 - p in training"
        ),
    ),
    Kind.OFF: KindReport(
        sentence="p = 0: it never drops",
    ),
    # A dropout that is never on has no gap: the export is right. The training was probably not what
    # its author meant, but only the author can tell. The same holds for one that is never called.
    Kind.NEVER_ON: KindReport(
        severity=Severity.WARNING,
        sentence="training changes nothing although its rate is not 0",
        fix="find out why it is not in training mode, or set p = 0 if that is meant",
    ),
    Kind.NOT_CALLED: KindReport(
        severity=Severity.WARNING,
        sentence="no sample's training forward calls it: nothing could be measured",
        fix="give a sample that reaches it, or remove it",
    ),
    Kind.UNSCALED: KindReport(
        severity=Severity.ERROR,
        sentence="it {keeps} and nothing makes up for the rest: {gap}",
        fix=("divide what is kept in training by 1 - p{keep_rate}, or multiply by it in eval"),
    ),
    Kind.WRONG_RATE: KindReport(
        severity=Severity.ERROR,
        sentence="it {keeps} but is scaled {scaled_for}: {gap}",
        fix="draw the mask and scale by the same rate, 1 - p{keep_rate}: {convention}",
    ),
    Kind.SCALED_TWICE: KindReport(
        severity=Severity.ERROR,
        sentence="it {keeps} and is scaled for that twice: {gap}",
        fix="scale either in training, by 1 / (1 - p), or in eval, by 1 - p, not twice",
    ),
    Kind.WRONG_SCALE: KindReport(
        severity=Severity.ERROR,
        sentence="{gap}",
        fix="choose the training scale so that its mean over many masks is what eval returns",
    ),
    Kind.DROPS_ALL: KindReport(
        severity=Severity.ERROR,
        sentence="training saw no value kept in {draws} forwards, eval keeps them all",
        fix="lower p below 1: {convention}",
    ),
    Kind.ALWAYS_ON: KindReport(
        severity=Severity.ERROR,
        sentence="it is random in eval too: the same input gets different answers",
        fix=(
            "make it ask self.training (F.dropout: training=self.training; attention: dropout_p=0"
            " in eval), and register it, not in a plain list, so that eval() reaches it"
        ),
    ),
    Kind.FROZEN: KindReport(
        severity=Severity.ERROR,
        sentence=(
            "every forward drops the same elements: they are never trained, and eval uses them"
        ),
        fix=(
            "draw a new mask in every forward: do not seed, or keep, a generator or a mask"
            " inside it"
        ),
    ),
    Kind.INCONCLUSIVE: KindReport(
        severity=Severity.UNPROVEN,
        sentence="{draws} draws cannot tell whether there is a gap",
        fix="raise the number of draws, or put the dropout into a module of its own",
    ),
}


def sentence(
    kind: Kind,
    *,
    gap: float | None,
    keep_rate: float | None,
    p: float | None,
    reason: str = "",
    draws: int = 0,
) -> str:
    """The sentence that reports a site.

    `reason` takes the place of the sentence of a wrong scale or an inconclusive site: it says what
    was seen beside the figures, or what stands in the way. Other kinds ignore it.
    """
    if reason and kind in (Kind.WRONG_SCALE, Kind.INCONCLUSIVE):
        text = reason
    else:
        gap_text = "training and eval differ on average" if gap is None else gap_sentence(gap)
        keeps, dropped_share, scaled_for = "", "a part", "for another rate"
        if keep_rate is not None:
            keeps = f"keeps {keep_rate:.3g} of its input"
            dropped_share = f"{100 * (1 - keep_rate):.2g} %"
        if gap and keep_rate:
            scaled_for = f"as if it kept {keep_rate / gap:.3g}"
        skip_rate = "?"
        if p is not None:
            skip_rate = f"{p:g}"
        elif keep_rate is not None:
            skip_rate = f"{1 - keep_rate:.2g} (measured)"
        text = REPORTS[kind].sentence.format(
            keeps=keeps,
            dropped_share=dropped_share,
            scaled_for=scaled_for,
            skip_rate=skip_rate,
            draws=draws,
            gap=gap_text,
        )
    return text + _rate_note(kind, keep_rate, p)


def fix(kind: Kind, *, p: float | None, keep_rate: float | None) -> str:
    """What the user should do about a site; "" where there is nothing to do."""
    # The declared rate, as that is the number which the user finds in the code.
    keep = 1 - p if p is not None else keep_rate
    value = f" = {keep:g}" if keep is not None and 0 < keep < 1 else ""
    return REPORTS[kind].fix.format(keep_rate=value, convention=_CONVENTION)


def gap_sentence(gap: float) -> str:
    """What a gap E[train] / eval does to the activations."""
    if gap <= 0:
        return "training passes on nothing of its input's size, eval does"
    factor, direction = (1 / gap, "larger") if gap < 1 else (gap, "smaller")
    # Two significant digits at least: 2.0, 1.11, 1.0005. "1.0 times larger" would say nothing.
    digits = 1 if abs(factor - round(factor, 1)) < 1e-6 else 2
    while round(factor, digits) == 1.0 and digits < 6:
        digits += 1
    return (
        f"activations reach the next layer {factor:.{digits}f} times {direction} in eval than in"
        " training"
    )


def _rate_note(kind: Kind, keep_rate: float | None, p: float | None) -> str:
    """A remark where p may have been meant as the keep probability; "" elsewhere."""
    if p is None or keep_rate is None:
        return ""
    if kind in (Kind.ALWAYS_ON, Kind.FROZEN, Kind.AUGMENTED, Kind.LAYERS_SKIPPED):
        return ""
    # The site keeps about p of its input, and clearly not 1 - p.
    smaller = min(p, 1 - p)
    if abs(keep_rate - p) < 0.1 * smaller and abs(keep_rate - (1 - p)) > 0.2 * smaller:
        return f" (p = {p:g} is what it keeps, not what it drops: {_CONVENTION})"
    if p > 0.5 and kind in (Kind.INVERTED, Kind.CLASSIC):
        return f" (p = {p:g} drops most of it: {_CONVENTION})"
    return ""


def user_scales(effect: Effect, figures: Figures) -> tuple[float | None, float | None]:
    """The train scale of kept values and the eval scale, as they stand in the user's code.

    (None, None) for noise that is no mask.
    """
    if effect.additive or effect.pattern is not None or figures.kept_value is None:
        return None, None
    return figures.kept_value * effect.scale, effect.balance * effect.scale


def name_kind(effect: Effect, figures: Figures, p: float | None) -> Kind:
    """The kind of a measured effect; `p` is the declared drop rate where there is one.

    Decided in this order:

    1. what the test could not decide, a mask that never changes, a mask that keeps nothing;
    2. a pattern that names its kind: wrong if its test failed or something else was seen with it;
    3. noise of no known form whose mean agrees;
    4. no gap: additive or multiplicative noise, or a mask, classic or inverted;
    5. a gap: the name of the mistake for a mask, a wrong scale for other noise.
    """
    if figures.outcome is Outcome.UNSURE:
        return Kind.INCONCLUSIVE
    if figures.outcome is Outcome.FROZEN:
        return Kind.FROZEN
    if figures.outcome is Outcome.NOTHING_KEPT:
        return Kind.DROPS_ALL

    has_gap = figures.outcome is Outcome.GAP
    if effect.pattern is not None:
        return Kind.WRONG_SCALE if effect.remark or has_gap else effect.pattern
    if effect.direction is not None:
        return Kind.UNBIASED

    s, e = user_scales(effect, figures)
    if not has_gap:
        if s is None or e is None:
            return Kind.ADDITIVE if effect.additive else Kind.MULTIPLICATIVE
        return Kind.CLASSIC if _is_close(s, 1) and not _is_close(e, 1) else Kind.INVERTED
    if s is None or e is None or figures.keep_rate is None:
        return Kind.WRONG_SCALE
    interval = figures.keep_interval or (figures.keep_rate, figures.keep_rate)
    return name_mistake(s, e, figures.keep_rate, interval, p)


def name_mistake(s: float, e: float, keep_rate: float, interval: Interval, p: float | None) -> Kind:
    """The mistake behind a gap, from the train scale s, the eval scale e and the keep rate k.

    Right is s / e = 1/k. Nothing scaled is s / e = 1, scaled twice 1/k^2. Any other ratio above 1
    belongs to another rate. k is 1 - p where the measured interval contains it, else the measured
    keep rate.
    """
    ratio = s / e if e else float("inf")
    if _is_close(ratio, 1):
        return Kind.UNSCALED
    if p is not None and interval[0] <= 1 - p <= interval[1]:
        k, tolerance = 1 - p, _NAME_TOLERANCE
    else:
        k, tolerance = keep_rate, _NAME_TOLERANCE
        # The error of a measured rate enters k^2 twice. Few draws of a tiny rate may keep nothing.
        if keep_rate > 0:
            tolerance = max(tolerance, 2 * (interval[1] - interval[0]) / keep_rate)
    if abs(ratio * k * k - 1) <= tolerance:
        return Kind.SCALED_TWICE
    return Kind.WRONG_RATE if ratio > 1 else Kind.WRONG_SCALE


def _is_close(a: float, b: float) -> bool:
    return abs(a - b) <= _NAME_TOLERANCE * abs(b)
