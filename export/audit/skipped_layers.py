"""LayerDrop: a module that skips whole layers in training, at random (Fan et al. 2019,
arXiv:1909.11556).

A skip is noise on a residual branch: a layer gives x + b f(x), with b = 0 where it is skipped. That
this is all the module does at random is not guessed but compared: its training output must be
that of an eval forward in which the same layers pass on their input. Knows no kind of network by
name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evalmode.export.audit.balance import Balance
from evalmode.export.audit.by_tape import TapeObserver
from evalmode.export.audit.isolated_site import IsolatedSite, rounding
from evalmode.export.audit.site import Effect, Unclear

_PROBES = 32
_COMPARED = 8


class SkippedLayers:
    """An observer of the layers that are skipped: the noise is 0 or the factor of what they add."""

    def __init__(self, held: IsolatedSite, layers: list[nn.Module], factor: float) -> None:
        """`factor`: what a layer adds in training, where it runs, over what it adds in eval."""
        self.layers, self.factor = layers, factor
        step = rounding(held.run(training=False))
        self.effects: tuple[Effect, ...] = (Effect(balance=1.0, rounding=64 * step),)
        self._held = held

    @classmethod
    def of(
        cls, held: IsolatedSite, layers: list[nn.Module], rest: TapeObserver | None
    ) -> SkippedLayers | None:
        """The observer of a site all of whose randomness, but for what `rest` observes, is that it
        skips `layers`; None for any other.
        """
        draws = [_draw(held, layers, rest) for _ in range(_COMPARED)]
        factor = _factor(held, layers, draws)
        if factor is None or any(
            not _balance(held, layers, missing, output).holds({0: factor})
            for missing, output in draws
        ):
            return None
        return cls(held, layers, factor)

    def draw(self) -> list[Tensor]:
        """Each layer's factor in one more training forward."""
        called = set(self._held.calls_of(training=True))
        factors = [self.factor if layer in called else 0.0 for layer in self.layers]
        return [torch.tensor(factors, dtype=torch.float64)]


def skipped(held: IsolatedSite) -> list[nn.Module]:
    """The modules that the site calls in eval, and not in every training forward.

    With them those of the same class, since a small rate may spare one in all of the probes.
    """
    always = dict.fromkeys(held.calls_of(training=False))
    classes: set[type] = set()
    for _ in range(_PROBES):
        classes |= {type(module) for module in set(always) - set(held.calls_of(training=True))}
    return [module for module in always if type(module) in classes]


def layer_drop_rate(site: nn.Module) -> float | None:
    """The rate that a module, or its configuration, holds under the name of LayerDrop."""
    for holder in (site, getattr(site, "config", None)):
        for name in ("layerdrop", "layer_drop", "layer_drop_prob", "encoder_layerdrop"):
            rate = getattr(holder, name, None)
            if isinstance(rate, int | float):
                return float(rate)
    return None


def _draw(
    held: IsolatedSite, layers: list[nn.Module], rest: TapeObserver | None
) -> tuple[set[nn.Module], list[Tensor]]:
    """The layers that one training forward skipped, and its output without the other noise."""
    output = held.run(training=True, watched=True) if rest is None else rest.balanced(watched=True)
    return set(layers) - set(held.called), output


def _balance(
    held: IsolatedSite, layers: list[nn.Module], missing: set[nn.Module], output: list[Tensor]
) -> Balance:
    """Compares a training output with eval forwards that skip the same layers."""

    def forward(constants: object) -> list[Tensor]:
        assert isinstance(constants, dict)
        factors = {layer: 0.0 if layer in missing else constants.get(0, 1.0) for layer in layers}
        with held.branches(factors):
            return held.run(training=False)

    return Balance(forward, output)


def _factor(
    held: IsolatedSite,
    layers: list[nn.Module],
    draws: list[tuple[set[nn.Module], list[Tensor]]],
) -> float | None:
    """What makes the layers that ran count as they did in training: 1, or found by secants."""
    informative = [(missing, output) for missing, output in draws if len(missing) < len(layers)]
    if not informative:
        return 1.0
    balance = _balance(held, layers, *informative[0])
    if balance.holds({0: 1.0}):
        return 1.0
    found = balance.find([[0]], [False], [1.0], None)
    return None if isinstance(found, Unclear) else found[0]
