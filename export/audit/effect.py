"""What is to be measured: noise that enters linearly, and the constant for which training would equal eval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from evalmode.export.audit.site import Kind


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One noise of a site. There is no gap when the noise's mean is `balance`.

    `scale` is the factor, in training and eval alike, between noise and what a user sees: a mask's kept value v is
    the train scale v * scale, and the eval scale is balance * scale (1 where they are not seen). `rounding` is the
    relative error of values and balance. `law` names a kind that has a law of its own. `direction`, eval's output over
    its norm, marks noise of no known form: what is drawn is then the output's difference from eval's over that norm,
    whose mean should vanish, and a mean that does not proves no gap. `why` says what was seen beside the figures.
    """

    balance: float
    additive: bool = False
    scale: float = 1.0
    rounding: float = 0.0
    direction: Tensor | None = None
    law: Kind | None = None
    why: str = ""


class Observer(Protocol):
    """Repeats a site in training and hands out the noise of each effect, NaN where it cannot be seen."""

    effects: tuple[Effect, ...]

    def draw(self) -> list[Tensor]:
        """The noise of one more forward, float64, one tensor an effect; its axes are those that a mask may share."""


@dataclass(frozen=True)
class Unclear:
    """Why a site cannot be measured in a way; the next way may do."""

    why: tuple[str, ...] = ()
