"""The records of the audit: what it measured of a site, and what it reports to the user.

`verdicts.py` says how each kind is reported: its severity, its sentence and its fix.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Protocol

from torch import Tensor

from evalmode.bundle.certificate import Severity

Interval = tuple[float, float]

# The most training forwards in one test of a site. More would take minutes for a large module; a
# test that needs more is inconclusive.
MOST_DRAWS = 20_000


class Kind(StrEnum):
    """The verdict on a site.

    k is the keep rate, s the factor of kept values in training, e the factor of all values in eval.
    Training and eval agree on average where k s = e.
    """

    # The means agree.
    INVERTED = "inverted"  # s = 1/k, e = 1
    CLASSIC = "classic"  # s = 1, e = k
    ALPHA = "alpha"  # keeps the mean and the variance of N(0, 1), as AlphaDropout does
    MULTIPLICATIVE = "multiplicative noise"  # factors that are no mask: Gaussian dropout
    ADDITIVE = "additive noise"
    UNBIASED = "unbiased noise"  # of no known form, but the mean of the output is eval's

    # The means differ by design.
    AUGMENTED = "data augmentation"  # training masks or replaces values
    LAYERS_SKIPPED = "layers skipped"  # training skips layers and scales nothing: LayerDrop

    # The site never drops.
    OFF = "off"  # p = 0
    NEVER_ON = "never on"  # p > 0, and training changes nothing
    NOT_CALLED = "not called"  # no sample reaches it

    # The means differ by mistake.
    UNSCALED = "unscaled"  # s = e: no factor makes up for what is dropped
    WRONG_RATE = "wrong rate"  # scaled for another rate than the mask's
    SCALED_TWICE = "scaled twice"  # s / e = 1/k^2
    WRONG_SCALE = "wrong scale"  # a gap that no other kind explains
    DROPS_ALL = "drops everything"  # k = 0

    # The noise itself is wrong.
    ALWAYS_ON = "always on"  # random in eval
    FROZEN = "frozen mask"  # every forward draws the same mask

    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, kw_only=True)
class Site:
    """The report on one source of noise in a module.

    `path` is the module's path ("" is the root), `type` its class. `draw` numbers the sources of a
    module that has several. `call` numbers a call whose verdict differs from the first call's; the
    first has 0. `p` is the declared drop probability.

    `train_scale` is the factor of kept values in training, `eval_scale` the factor of all values in
    eval. `gap` is E[train] / eval, 1 where nothing is wrong. The intervals hold at the audit's
    level, all sites together. A figure is None where this kind has none, or where it could not be
    measured.

    `draws` counts the training forwards of the test. `calls` counts the calls of the module in all
    samples' forwards, and `judged` those that were captured to be judged. `severity` is None where
    there is nothing to report.
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
        """The path, with the draw and the call where a module has several: "drop, call 2"."""
        draw = f", draw {self.draw}" if self.draw else ""
        call = f", call {self.call}" if self.call else ""
        return f"{self.path or '(root)'}{draw}{call}"


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One noise of a site. There is no gap where the mean of the noise is `balance`.

    `additive`: the noise is added to the data, not multiplied.

    `scale` is a constant factor beside the noise, the same in training and eval. For a mask whose
    kept values are v, the user's train scale is v * scale and the eval scale is balance * scale.
    It is 1 where no such factor is visible.

    `rounding` is the relative error of the noise and of `balance`.

    `pattern` is ALPHA or AUGMENTED where the form of the noise already names the kind. `remark` is
    what was seen beside the figures; with a pattern it makes the effect a wrong scale.

    `direction` is eval's output over its norm, shape (elements,), and marks noise of no known form.
    The noise is then the output's difference from eval over that norm. Its mean should vanish; a
    mean that does not vanish proves no gap.
    """

    balance: float
    additive: bool = False
    scale: float = 1.0
    rounding: float = 0.0
    direction: Tensor | None = None
    pattern: Kind | None = None
    remark: str = ""


class NoiseObserver(Protocol):
    """Repeats a site in training and returns the noise of each effect."""

    effects: tuple[Effect, ...]

    def draw(self) -> list[Tensor]:
        """The noise of one more forward: one float64 tensor per effect.

        A tensor is NaN where the noise is not visible. A mask may be shared along its axes.
        """


@dataclass(frozen=True)
class Unclear:
    """A site cannot be measured in one way; another way may do.

    `reasons` is empty where there was no noise to measure.
    """

    reasons: tuple[str, ...] = ()


class Outcome(Enum):
    """What the draws prove about the gap."""

    NO_GAP = auto()
    GAP = auto()
    UNSURE = auto()
    FROZEN = auto()
    NOTHING_KEPT = auto()


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The measured figures of one effect. `kept_value` is the value of a mask where it keeps; None
    where the noise is no mask.
    """

    outcome: Outcome
    draws: int
    kept_value: float | None = None
    keep_rate: float | None = None
    keep_interval: Interval | None = None
    gap: float | None = None
    gap_interval: Interval | None = None
