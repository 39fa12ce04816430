"""The records of the audit: what it measured at a site, and what it reports to the user.

From the noise to the report: a site has one `Effect` for each of its noises. A `NoiseObserver`
returns their noise, forward by forward. The tests turn that noise into `Figures`, and
`verdicts.py` turns figures into a `Kind` and a `SiteReport`.
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
class SiteReport:
    """The report on one source of noise in a module.

    `path` is the module's path ("" is the root) and `type` its class. `p` is the declared drop
    probability.

    `source` numbers the noises of a module that has several: "1 of 2". `call` is the number of a
    call whose verdict differs from that of the module's first call; else it is 0.

    `train_scale` is the factor of kept values in training, `eval_scale` the factor of all values in
    eval. `gap` is E[train] / eval, 1 where nothing is wrong. The intervals hold at the audit's
    level, all sites together. A figure is None where this kind has none, or where it could not be
    measured.

    `forward_count` counts the training forwards of the test. `call_count` counts the calls of the
    module in all samples' forwards, and `captured_count` those that were captured to be judged.
    `severity` is None where there is nothing to report.
    """

    path: str
    type: str
    kind: Kind
    source: str = ""
    call: int = 0
    p: float | None = None
    keep_rate: float | None = None
    keep_interval: Interval | None = None
    train_scale: float | None = None
    eval_scale: float | None = None
    gap: float | None = None
    gap_interval: Interval | None = None
    forward_count: int = 0
    call_count: int = 0
    captured_count: int = 0
    sentence: str = ""
    fix: str = ""
    severity: Severity | None = None

    @property
    def name(self) -> str:
        """The path, with the source and the call where there are several: "drop, call 2"."""
        name = self.path or "(root)"
        if self.source:
            name += f", draw {self.source}"
        if self.call:
            name += f", call {self.call}"
        return name


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One noise of a site, and the mean that it must have.

    `balance` is that mean: noise with another mean is a gap. `additive` says that the noise is
    added to the data, not multiplied. `rounding` is the relative error of the noise and of
    `balance`.

    `scale` is a constant factor beside the noise, the same in training and eval. For a mask whose
    kept values are v, the user's train scale is v * scale and the eval scale is balance * scale.
    It is 1 where no such factor is visible.

    `pattern` is ALPHA or AUGMENTED where the form of the noise already names the kind. `remark` is
    what was seen beside the figures; with a pattern it makes the effect a wrong scale.

    `direction` marks noise of no known form. It is eval's output over its norm, shape (elements,).
    The noise is then the difference between the outputs of training and eval, over the same norm.
    Its mean should vanish, but a mean that does not vanish proves no gap.
    """

    balance: float
    additive: bool = False
    scale: float = 1.0
    rounding: float = 0.0
    direction: Tensor | None = None
    pattern: Kind | None = None
    remark: str = ""


class NoiseObserver(Protocol):
    """Repeats a call of a site in training, and returns the noise of each effect."""

    effects: tuple[Effect, ...]

    def draw(self) -> list[Tensor]:
        """The noise of one more forward: one float64 tensor per effect.

        A tensor is NaN where the noise is not visible. A mask may be shared along its axes.
        """


@dataclass(frozen=True)
class Unclear:
    """A site cannot be measured in one way; another way may do. `reasons` say what prevents it."""

    reasons: tuple[str, ...] = ()

    @property
    def saw_no_noise(self) -> bool:
        """Whether nothing prevented the measurement, and there was no noise to measure."""
        return not self.reasons


class Outcome(Enum):
    """What the noise of the measured forwards proves."""

    NO_GAP = auto()
    GAP = auto()
    UNSURE = auto()
    FROZEN = auto()  # the noise is the same mask in every forward
    NOTHING_KEPT = auto()  # the noise is 0 everywhere in every forward


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The measured figures of one effect.

    `forward_count` counts the training forwards of the test. `kept_value` is the value of a mask
    where it keeps; None where the noise is no mask.
    """

    outcome: Outcome
    forward_count: int
    kept_value: float | None = None
    keep_rate: float | None = None
    keep_interval: Interval | None = None
    gap: float | None = None
    gap_interval: Interval | None = None
