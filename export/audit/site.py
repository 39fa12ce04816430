"""What the audit says of one site: its kind, what was measured, and the sentence a user reads.

Knows neither how it was measured nor any network.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Protocol

from torch import Tensor

from evalmode.bundle.certificate import Severity

Interval = tuple[float, float]
MOST_DRAWS = 20_000  # forwards of one site in one test


class Kind(StrEnum):
    """What a site turned out to be. Below k is the keep rate, s the train scale of what is kept, e
    the eval scale.
    """

    INVERTED = "inverted"  # s = 1/k, e = 1
    CLASSIC = "classic"  # s = 1, e = k
    ALPHA = "alpha"  # keeps the mean and the variance of N(0, 1), as AlphaDropout does
    MULTIPLICATIVE = "multiplicative noise"  # factors that are no mask, Gaussian dropout for one
    ADDITIVE = "additive noise"
    UNBIASED = (
        "unbiased noise"  # of no form that is known; the mean of what the site returns is eval's
    )
    AUGMENTED = "data augmentation"  # values are masked or replaced in training, by design
    LAYERS_SKIPPED = "layers skipped"  # whole layers are, and nothing is scaled: LayerDrop
    OFF = "off"  # p = 0
    UNSCALED = "unscaled"  # s = e: nothing makes up for what is dropped
    WRONG_RATE = "wrong rate"  # scaled, or drawn, as another rate would need
    SCALED_TWICE = "scaled twice"  # k is made up for twice
    WRONG_SCALE = "wrong scale"  # a gap that none of the names above explains
    ALWAYS_ON = "always on"  # random in eval
    NEVER_ON = "never on"  # p > 0, and training changes nothing
    DROPS_ALL = "drops everything"  # k = 0
    FROZEN = "frozen mask"  # every forward draws the same mask
    NOT_CALLED = "not called"  # no sample reaches it
    INCONCLUSIVE = "inconclusive"


# A gap, or randomness where none may be, is an error. What never drops has no gap: the exported
# model is right, the training was not what its author meant, and only he can tell. So is a dropout
# that no sample reaches. LayerDrop and augmentation differ on average because they are meant to.
SEVERITIES = {
    Kind.UNSCALED: Severity.ERROR,
    Kind.WRONG_RATE: Severity.ERROR,
    Kind.SCALED_TWICE: Severity.ERROR,
    Kind.WRONG_SCALE: Severity.ERROR,
    Kind.ALWAYS_ON: Severity.ERROR,
    Kind.DROPS_ALL: Severity.ERROR,
    Kind.FROZEN: Severity.ERROR,
    Kind.AUGMENTED: Severity.WARNING,
    Kind.LAYERS_SKIPPED: Severity.WARNING,
    Kind.NEVER_ON: Severity.WARNING,
    Kind.NOT_CALLED: Severity.WARNING,
    Kind.INCONCLUSIVE: Severity.UNPROVEN,
}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place that drops or adds noise.

    `path` is the module's ("" is the root), `type` its class, `draw` names one of several places
    inside it ("" where there is one), and `call` is the number of a call whose verdict is unlike
    that of the first (0 for the first). `p` is the declared drop probability. `train_scale` is the
    factor of what is kept in training, `eval_scale` the factor of everything in eval, `gap` =
    E[train] / eval, 1 when nothing is wrong; the intervals hold at the audit's level, all sites
    together. None stands for what a site of this kind has not, or could not be measured. `draws`
    counts the training forwards that measured it, `calls` how often all samples' forwards called
    it, of which `judged` were looked at. `severity` is None for a site with nothing to report.
    """

    path: str
    type: str
    kind: Kind
    draw: str = ""
    call: int = 0
    p: float | None = None
    keep_rate: float | None = None
    keep_interval: Interval | None = None
    train_scale: float | None = None
    eval_scale: float | None = None
    gap: float | None = None
    gap_interval: Interval | None = None
    draws: int = 0
    calls: int = 0
    judged: int = 0
    sentence: str = ""
    fix: str = ""
    severity: Severity | None = None

    @property
    def name(self) -> str:
        """Its path, with the draw and the call where there are several."""
        draw = f", draw {self.draw}" if self.draw else ""
        call = f", call {self.call}" if self.call else ""
        return f"{self.path or '(root)'}{draw}{call}"


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One noise of a site. There is no gap when the noise's mean is `balance`.

    `scale` is the factor, in training and eval alike, between noise and what a user sees: a mask's
    kept value v is the train scale v * scale, and the eval scale is balance * scale (1 where they
    are not seen). `rounding` is the relative error of values and balance. `law` names a kind that
    has a law of its own. `direction`, eval's output over its norm, marks noise of no known form:
    what is drawn is then the output's difference from eval's over that norm, whose mean should
    vanish, and a mean that does not proves no gap. `why` says what was seen beside the figures.
    """

    balance: float
    additive: bool = False
    scale: float = 1.0
    rounding: float = 0.0
    direction: Tensor | None = None
    law: Kind | None = None
    why: str = ""


class NoiseObserver(Protocol):
    """Repeats a site in training and hands out the noise of each effect, NaN where it cannot be
    seen.
    """

    effects: tuple[Effect, ...]

    def draw(self) -> list[Tensor]:
        """The noise of one more forward, float64, one tensor an effect; its axes are those that a
        mask may share.
        """


@dataclass(frozen=True)
class Unclear:
    """Why a site cannot be measured in a way; the next way may do."""

    why: tuple[str, ...] = ()


class Outcome(Enum):
    """What the draws say of the gap."""

    NONE = auto()
    GAP = auto()
    UNSURE = auto()
    FROZEN = auto()
    NOTHING_KEPT = auto()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One effect's figures: `value` is what a mask keeps (None: no mask)."""

    outcome: Outcome
    draws: int
    value: float | None = None
    keep: float | None = None
    keep_interval: Interval | None = None
    gap: float | None = None
    gap_interval: Interval | None = None
