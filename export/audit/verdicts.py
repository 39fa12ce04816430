"""From figures to a verdict: the kind of a site, the sentence that a user reads, and what to write
instead.
"""

from __future__ import annotations

from evalmode.export.audit.site import Effect, Kind, Measured, Outcome

# Names, not verdicts: how near a scale must be to a formula to be called by it.
_NEAR = 1e-3


def scales(effect: Effect, measured: Measured) -> tuple[float | None, float | None]:
    """The train scale of what is kept and the eval scale, as a user sees them; None for what is not
    a mask.
    """
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


def mistake(
    s: float, e: float, keep: float, interval: tuple[float, float], p: float | None
) -> Kind:
    """The name of a gap, by the ratio s / e that training and eval have, which at keep rate k
    should be 1 / k.

    Nothing scaled: s / e = 1. Twice: 1 / k^2. Any other ratio above 1 belongs to another rate. k is
    the declared rate's where the measured interval holds it, else the measured.
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


_WITHOUT_NOTE = (Kind.ALWAYS_ON, Kind.FROZEN, Kind.AUGMENTED, Kind.LAYERS_SKIPPED)
_CONVENTION = "papers often call the keep probability p, PyTorch's p is the drop probability"
REACH = "give samples that reach it"


def gap_sentence(gap: float) -> str:
    """What a gap E[train] / eval does to the activations."""
    if gap <= 0:
        return "training passes on nothing of its input's size, eval does"
    if gap < 1:
        return (
            f"activations reach the next layer {_number(1 / gap)} times larger in eval than in"
            " training"
        )
    return f"activations reach the next layer {_number(gap)} times smaller in eval than in training"


def sentence(
    kind: Kind,
    *,
    gap: float | None,
    keep: float | None,
    p: float | None,
    why: str = "",
    draws: int = 0,
) -> str:
    """One sentence for a site; `why` is what stands in the way, or what was seen beside the
    figures.
    """
    grows = "" if gap is None else gap_sentence(gap)
    rate = "" if keep is None else f"keeps {keep:.3g} of its input"
    texts = {
        Kind.INVERTED: "training scales what it keeps up, eval changes nothing: the means agree",
        Kind.CLASSIC: "training keeps values as they are, eval scales them down: the means agree",
        Kind.ALPHA: "mean and variance of a standard normal input stay what they are",
        Kind.MULTIPLICATIVE: "training multiplies by noise whose mean is eval's factor",
        Kind.ADDITIVE: "training adds noise whose mean is what eval adds",
        Kind.UNBIASED: "what it returns in training is, on average, what it returns in eval",
        Kind.AUGMENTED: (
            f"in training it masks or replaces {_share(keep)} of its values, in eval none: this is"
            " meant as augmentation, and no scale makes up for it"
        ),
        Kind.LAYERS_SKIPPED: (
            f"in training it skips layers with p = {_skipped(p, keep)} and scales nothing for it,"
            " as LayerDrop does: on average a layer adds less in training than in eval"
        ),
        Kind.OFF: "p = 0: it never drops",
        Kind.UNSCALED: f"it {rate} and nothing makes up for the rest: {grows}",
        Kind.WRONG_RATE: f"it {rate} but is scaled {_as_if(gap, keep)}: {grows}",
        Kind.SCALED_TWICE: f"it {rate} and is scaled for that twice: {grows}",
        Kind.WRONG_SCALE: why or (grows or "training and eval differ on average"),
        Kind.ALWAYS_ON: "it is random in eval too: the same input gets different answers",
        Kind.NEVER_ON: why or "training changes nothing although its rate is not 0",
        Kind.DROPS_ALL: f"training saw no value kept in {draws} forwards, eval keeps them all",
        Kind.FROZEN: (
            "every forward drops the same elements: they are never trained, and eval uses them"
        ),
        Kind.NOT_CALLED: "no sample's training forward calls it: nothing could be measured",
        Kind.INCONCLUSIVE: why or f"{draws} draws cannot tell whether there is a gap",
    }
    return texts[kind] + _note(kind, keep, p)


def _share(keep: float | None) -> str:
    return "a part" if keep is None else f"{100 * (1 - keep):.2g} %"


def _skipped(p: float | None, keep: float | None) -> str:
    return f"{p:g}" if p is not None else "?" if keep is None else f"{1 - keep:.2g} (measured)"


def _as_if(gap: float | None, keep: float | None) -> str:
    return f"as if it kept {keep / gap:.3g}" if gap and keep else "for another rate"


def _note(kind: Kind, keep: float | None, p: float | None) -> str:
    """A declared rate that is not the measured one, and is its complement or is easily taken for
    it.
    """
    if p is None or keep is None or kind in _WITHOUT_NOTE:
        return ""
    if abs(keep - p) < 0.1 * min(p, 1 - p) and abs(keep - (1 - p)) > 0.2 * min(p, 1 - p):
        return f" (p = {p:g} is what it keeps, not what it drops: {_CONVENTION})"
    if p > 0.5 and kind in (Kind.INVERTED, Kind.CLASSIC):
        return f" (p = {p:g} drops most of it: {_CONVENTION})"
    return ""


def fix(kind: Kind, *, p: float | None, keep: float | None) -> str:
    """What to do about a site, in one sentence."""
    drop = p if p is not None else (0.0 if keep is None else 1 - keep)
    texts = {
        Kind.UNSCALED: (
            f"divide what is kept in training by 1 - p{_value(1 - drop)}, or multiply by it in eval"
        ),
        Kind.WRONG_RATE: (
            f"draw the mask and scale by the same rate, 1 - p{_value(1 - drop)}: {_CONVENTION}"
        ),
        Kind.SCALED_TWICE: (
            "scale either in training, by 1 / (1 - p), or in eval, by 1 - p, not twice"
        ),
        Kind.WRONG_SCALE: (
            "choose the training scale so that its mean over many masks is what eval returns"
        ),
        Kind.ALWAYS_ON: (
            "make it ask self.training (F.dropout: training=self.training; attention: dropout_p=0"
            " in eval), and register it, not in a plain list, so that eval() reaches it"
        ),
        Kind.AUGMENTED: (
            "nothing, if augmentation is meant; a dropout divides what it keeps by 1 - p"
        ),
        Kind.LAYERS_SKIPPED: (
            "nothing, if LayerDrop is meant (arXiv:1909.11556); else divide what a layer adds by"
            " 1 - p in training"
        ),
        Kind.NEVER_ON: "find out why it is not in training mode, or set p = 0 if that is meant",
        Kind.DROPS_ALL: f"lower p below 1: {_CONVENTION}",
        Kind.FROZEN: (
            "draw a new mask in every forward: do not seed, or keep, a generator or a mask"
            " inside it"
        ),
        Kind.NOT_CALLED: "give a sample that reaches it, or remove it",
        Kind.INCONCLUSIVE: "raise the number of draws, or put the dropout into a module of its own",
    }
    return texts.get(kind, "")


def _value(number: float) -> str:
    return f" = {number:g}" if 0 < number < 1 else ""


def _number(factor: float) -> str:
    """Two digits at least: 2.0, 1.11, 1.0005."""
    digits = 1 if abs(factor - round(factor, 1)) < 1e-6 else 2
    while round(factor, digits) == 1.0 and digits < 6:
        digits += 1
    return f"{factor:.{digits}f}"
