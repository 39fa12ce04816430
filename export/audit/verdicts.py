"""From figures to a verdict and its report.

`name_kind` chooses the kind of a measured effect. `KIND_REPORTS` holds what the audit prints for
each kind, and `report_site` fills it in for one site.
"""

from __future__ import annotations

from dataclasses import dataclass

from evalmode.bundle.certificate import Severity
from evalmode.export.audit.find_sites import PossibleSite
from evalmode.export.audit.site import Effect, Figures, Interval, Kind, Outcome, SiteReport

# Two scales count as equal up to this relative difference. It decides the name of a kind alone: the
# tests in `measure.py` decide whether there is a gap.
_NAME_TOLERANCE = 1e-3

_CONVENTION = "papers often call the keep probability p, PyTorch's p is the drop probability"
_NOT_MEASURED = Figures(outcome=Outcome.NO_GAP, forward_count=0)


@dataclass(frozen=True, kw_only=True)
class KindReport:
    """How one kind is reported. With severity None it is a line of the table, and no finding.

    `sentence` and `fix` are templates, which `sentence_of` and `fix_of` fill in.
    """

    severity: Severity | None = None
    sentence: str
    fix: str = ""


KIND_REPORTS: dict[Kind, KindReport] = {
    Kind.INVERTED: KindReport(
        sentence="training scales up what it keeps, eval changes nothing: the means agree",
    ),
    Kind.CLASSIC: KindReport(
        sentence="training keeps values as they are, eval scales them down: the means agree",
    ),
    Kind.ALPHA: KindReport(
        sentence="the mean and the variance of a standard normal input do not change",
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
        sentence="training kept no value in {draws} forwards, eval keeps them all",
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
            "draw a new mask in every forward: do not seed a generator in the forward, and do not"
            " store a mask"
        ),
    ),
    Kind.INCONCLUSIVE: KindReport(
        severity=Severity.UNPROVEN,
        sentence="{draws} draws cannot tell whether there is a gap",
        fix="raise the number of draws, or put the dropout into a module of its own",
    ),
}


def report_site(
    possible_site: PossibleSite,
    kind: Kind,
    *,
    source: str = "",
    figures: Figures = _NOT_MEASURED,
    train_scale: float | None = None,
    eval_scale: float | None = None,
    reason: str = "",
) -> SiteReport:
    """The report on one noise of a site, with the severity, the sentence and the fix of its kind.

    `source` and the scales are those of `SiteReport`, `reason` that of `sentence_of`.
    """
    p, gap, keep_rate = possible_site.p, figures.gap, figures.keep_rate
    forward_count = figures.forward_count
    return SiteReport(
        path=possible_site.path,
        type=possible_site.type,
        kind=kind,
        source=source,
        p=p,
        keep_rate=keep_rate,
        keep_interval=figures.keep_interval,
        train_scale=train_scale,
        eval_scale=eval_scale,
        gap=gap,
        gap_interval=figures.gap_interval,
        forward_count=forward_count,
        call_count=possible_site.call_count,
        captured_count=len(possible_site.calls),
        sentence=sentence_of(
            kind, gap=gap, keep_rate=keep_rate, p=p, reason=reason, forward_count=forward_count
        ),
        fix=fix_of(kind, p=p, keep_rate=keep_rate),
        severity=KIND_REPORTS[kind].severity,
    )


def sentence_of(
    kind: Kind,
    *,
    gap: float | None,
    keep_rate: float | None,
    p: float | None,
    reason: str = "",
    forward_count: int = 0,
) -> str:
    """The sentence that reports a site of this kind.

    A wrong scale and an inconclusive site are reported by `reason`, where there is one. It says
    what was seen beside the figures, or what prevents a measurement. Other kinds ignore it.
    """
    note = _rate_note(kind, keep_rate, p)
    if reason and kind in (Kind.WRONG_SCALE, Kind.INCONCLUSIVE):
        return reason + note

    gap_text = "training and eval differ on average" if gap is None else gap_sentence(gap)
    keeps, dropped_share, scaled_for, skip_rate = "", "a part", "for another rate", "?"
    if keep_rate is not None:
        keeps = f"keeps {keep_rate:.3g} of its input"
        dropped_share = f"{100 * (1 - keep_rate):.2g} %"
        skip_rate = f"{1 - keep_rate:.2g} (measured)"
    if gap and keep_rate:
        scaled_for = f"as if it kept {keep_rate / gap:.3g}"
    if p is not None:
        skip_rate = f"{p:g}"
    text = KIND_REPORTS[kind].sentence.format(
        keeps=keeps,
        dropped_share=dropped_share,
        scaled_for=scaled_for,
        skip_rate=skip_rate,
        draws=forward_count,
        gap=gap_text,
    )
    return text + note


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


def fix_of(kind: Kind, *, p: float | None, keep_rate: float | None) -> str:
    """What the user should do about a site of this kind; "" where there is nothing to do."""
    # The declared rate comes first: it is the number that the user finds in the code.
    keep = keep_rate if p is None else 1 - p
    keep_text = ""
    if keep is not None and 0 < keep < 1:
        keep_text = f" = {keep:g}"
    return KIND_REPORTS[kind].fix.format(keep_rate=keep_text, convention=_CONVENTION)


def gap_sentence(gap: float) -> str:
    """What a gap E[train] / eval does to the activations."""
    if gap <= 0:
        return "training passes on nothing of its input's size, eval does"
    if gap < 1:
        factor, direction = 1 / gap, "larger"
    else:
        factor, direction = gap, "smaller"
    # Two significant digits at least: 2.0, 1.11, 1.0005. "1.0 times larger" would say nothing.
    digits = 1 if abs(factor - round(factor, 1)) < 1e-6 else 2
    while round(factor, digits) == 1.0 and digits < 6:
        digits += 1
    return (
        f"activations reach the next layer {factor:.{digits}f} times {direction} in eval than in"
        " training"
    )


def user_scales(effect: Effect, figures: Figures) -> tuple[float | None, float | None]:
    """The train scale of kept values and the eval scale, as the user's code has them.

    Both are None for noise that is no mask.
    """
    if effect.additive or effect.pattern is not None or figures.kept_value is None:
        return None, None
    return figures.kept_value * effect.scale, effect.balance * effect.scale


def name_kind(effect: Effect, figures: Figures, p: float | None) -> Kind:
    """The kind of a measured effect; `p` is the declared drop rate where there is one.

    Decided in this order:

    1. the test decided nothing: inconclusive; the mask never changes: frozen mask; the mask keeps
       nothing: drops everything;
    2. a pattern names the kind, or a wrong scale if there is a remark or a gap;
    3. noise of no known form whose mean agrees: unbiased;
    4. no gap: additive or multiplicative noise; for a mask, classic or inverted;
    5. a gap: the name of the mistake for a mask, a wrong scale for other noise.
    """
    # 1. What the outcome alone decides.
    if figures.outcome is Outcome.UNSURE:
        return Kind.INCONCLUSIVE
    if figures.outcome is Outcome.FROZEN:
        return Kind.FROZEN
    if figures.outcome is Outcome.NOTHING_KEPT:
        return Kind.DROPS_ALL

    # 2. A pattern.
    has_gap = figures.outcome is Outcome.GAP
    if effect.pattern is not None:
        return Kind.WRONG_SCALE if effect.remark or has_gap else effect.pattern

    # 3. Noise of no known form: its test proves no gap, so this is agreement.
    if effect.direction is not None:
        return Kind.UNBIASED

    # 4. No gap.
    s, e = user_scales(effect, figures)
    if not has_gap:
        if s is None or e is None:
            return Kind.ADDITIVE if effect.additive else Kind.MULTIPLICATIVE
        return Kind.CLASSIC if _is_close(s, 1) and not _is_close(e, 1) else Kind.INVERTED

    # 5. A gap.
    if s is None or e is None or figures.keep_rate is None:
        return Kind.WRONG_SCALE
    interval = figures.keep_interval or (figures.keep_rate, figures.keep_rate)
    return name_mistake(s, e, figures.keep_rate, interval, p)


def name_mistake(s: float, e: float, keep_rate: float, interval: Interval, p: float | None) -> Kind:
    """The mistake behind the gap of a mask.

    With the train scale s, the eval scale e and the keep rate k, there is no gap at s / e = 1/k.
    The ratio 1 is a mask that nothing scales, and 1/k^2 one that is scaled twice. Any other ratio
    above 1 is the scale of another rate.

    k is 1 - p where the measured interval contains it, else the measured keep rate.
    """
    ratio = s / e if e else float("inf")
    if _is_close(ratio, 1):
        return Kind.UNSCALED

    k, tolerance = keep_rate, _NAME_TOLERANCE
    if p is not None and interval[0] <= 1 - p <= interval[1]:
        k = 1 - p
    elif keep_rate > 0:  # few draws of a tiny rate may keep nothing
        # The error of a measured rate enters k^2 twice.
        tolerance = max(tolerance, 2 * (interval[1] - interval[0]) / keep_rate)
    if abs(ratio * k * k - 1) <= tolerance:
        return Kind.SCALED_TWICE
    return Kind.WRONG_RATE if ratio > 1 else Kind.WRONG_SCALE


def _is_close(a: float, b: float) -> bool:
    return abs(a - b) <= _NAME_TOLERANCE * abs(b)
