"""LayerDrop: a module that skips whole layers in training, at random (Fan et al. 2019,
arXiv:1909.11556).

A skip is noise on a residual branch: a layer returns x + b f(x), with b = 0 where it is skipped.
Whether the module does anything else at random is measured. Its training output must equal that of
an eval forward in which the same layers return their input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evalmode.export.audit.balance import Balance, Constants, NoiseGroup
from evalmode.export.audit.by_tape import TapeObserver
from evalmode.export.audit.isolated_site import IsolatedSite, rounding_step
from evalmode.export.audit.site import Effect, Unclear

# Training forwards that look for skipped layers. At a rate of 0.1, a single layer is missed once in
# 30 sites.
_PROBES = 32
# Training forwards that are compared with eval forwards.
_COMPARED_FORWARDS = 8


class SkippedLayers:
    """Observes the skips: the noise of a layer is 0 where it is skipped, else `factor`."""

    def __init__(self, site: IsolatedSite, layers: list[nn.Module], factor: float) -> None:
        """`factor` is the ratio of a layer's training output to its eval output, when it runs."""
        self.layers, self.factor = layers, factor
        rounding = 64 * rounding_step(site.run(training=False))
        self.effects: tuple[Effect, ...] = (Effect(balance=1.0, rounding=rounding),)
        self._site = site

    @classmethod
    def of(
        cls, site: IsolatedSite, layers: list[nn.Module], other_noise: TapeObserver | None
    ) -> SkippedLayers | None:
        """The observer of a site that skips `layers` and has no other noise than `other_noise`.

        None for any other site.
        """
        forwards: list[tuple[set[nn.Module], list[Tensor]]] = []
        for _ in range(_COMPARED_FORWARDS):
            if other_noise is None:
                output = site.run(training=True, watched=True)
            else:
                output = other_noise.balanced(watched=True)
            forwards.append((set(layers) - set(site.last_called), output))

        # The factor, from a forward in which a layer ran: 1, or found by secants.
        factor = 1.0
        for skipped, output in forwards:
            if len(skipped) == len(layers):
                continue
            balance = _balance(site, layers, skipped, output)
            if not balance.holds({0: 1.0}):
                skips = NoiseGroup(indices=[0], additive=False, largest=1.0)
                factors = balance.find([skips], p=None)
                if isinstance(factors, Unclear):
                    return None
                factor = factors[0]
            break

        for skipped, output in forwards:
            if not _balance(site, layers, skipped, output).holds({0: factor}):
                return None
        return cls(site, layers, factor)

    def draw(self) -> list[Tensor]:
        """The factor of each layer in one more training forward, shape (layers,)."""
        called = set(self._site.called_modules(training=True))
        factors = [self.factor if layer in called else 0.0 for layer in self.layers]
        return [torch.tensor(factors, dtype=torch.float64)]


def skipped_layers(site: IsolatedSite) -> list[nn.Module]:
    """The modules that the site calls directly in eval, but not in every training forward.

    Modules of the same class are included: at a small rate, the probes may never skip one of them.
    """
    in_eval = dict.fromkeys(site.called_modules(training=False))
    skipped_types: set[type] = set()
    for _ in range(_PROBES):
        in_training = set(site.called_modules(training=True))
        skipped_types.update(type(module) for module in set(in_eval) - in_training)
    return [module for module in in_eval if type(module) in skipped_types]


def layer_drop_rate(module: nn.Module) -> float | None:
    """The rate of LayerDrop that a module or its configuration holds, under one of its names."""
    for holder in (module, getattr(module, "config", None)):
        for name in ("layerdrop", "layer_drop", "layer_drop_prob", "encoder_layerdrop"):
            rate = getattr(holder, name, None)
            if isinstance(rate, int | float):
                return float(rate)
    return None


def _balance(
    site: IsolatedSite, layers: list[nn.Module], skipped: set[nn.Module], output: list[Tensor]
) -> Balance:
    """Compares a training output with eval forwards that skip the same layers.

    Constant 0 is the factor of the branches of the layers that run.
    """

    def forward(constants: Constants) -> list[Tensor]:
        factors = dict.fromkeys(layers, constants.get(0, 1.0)) | dict.fromkeys(skipped, 0.0)
        with site.scaled_branches(factors):
            return site.run(training=False)

    return Balance(forward, output)
