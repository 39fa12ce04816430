"""Dropout before a batch normalisation: the layer learns a variance that eval does not have.

Li, Chen, Hu and Yang, "Understanding the Disharmony between Dropout and Batch Normalization by
Variance Shift" (arXiv:1801.05134). The means may agree perfectly, so this is a separate warning.
Only torch's own batch normalisations are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evalmode.export.audit.call import Call
from evalmode.export.audit.isolated_site import IsolatedSite
from evalmode.export.module.network import Network

FIX = "put the dropout after the last batch normalisation, or leave it out"

_DRAWS = 16
# A warning needs a shift of 2 %, and of four standard errors: chance reaches these once in 15,000.
_SMALLEST_SHIFT = 0.02
_STANDARD_ERRORS = 4.0


@dataclass(frozen=True)
class VarianceShift:
    """A shift of the variance that a batch normalisation sees.

    `ratio`: variance in training divided by variance in eval, at the input of the batch
    normalisation `path`.
    """

    path: str
    ratio: float

    @property
    def sentence(self) -> str:
        """The shift and its consequence, as the audit reports it."""
        return (
            f"it feeds the batch normalisation {self.path}, whose input has {self.ratio:.2f} times"
            " the variance in training that it has in eval: the statistics learnt are not those of"
            " eval"
        )


def batch_norms(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers among `modules` that normalise by statistics learnt in training, by path."""
    return {
        path: module
        for path, module in modules.items()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }


def variance_shift(
    network: Network,
    module: nn.Module,
    norms: Mapping[str, nn.Module],
    sample: Mapping[str, Tensor],
) -> VarianceShift | None:
    """The variance shift at the first of `norms` that the noise of `module` reaches.

    None where it reaches none of them, or where the variance there does not change.
    """
    site = IsolatedSite(network, module, Call.of((), sample))
    with site.isolated():
        in_eval = _norm_inputs(network.module, norms, site.call)
        module.training = True
        in_training = [_norm_inputs(network.module, norms, site.call) for _ in range(_DRAWS)]

    for path, quiet in in_eval.items():
        noisy = [inputs[path] for inputs in in_training if path in inputs]
        same_shape = all(x.shape == quiet.shape for x in noisy)
        if not same_shape or all(torch.equal(x, quiet) for x in noisy):
            continue
        # The noise reaches this layer. Those behind it see its output, not the noise.
        expected = _variance(quiet)
        if expected == 0 or len(noisy) < 2:
            return None
        ratios = torch.tensor([_variance(x) / expected for x in noisy], dtype=torch.float64)
        ratio = float(ratios.mean())
        standard_error = float(ratios.std()) / len(noisy) ** 0.5
        if abs(ratio - 1) > max(_SMALLEST_SHIFT, _STANDARD_ERRORS * standard_error):
            return VarianceShift(path, ratio)
        return None
    return None


def _variance(x: Tensor) -> float:
    """The mean over channels of the variance over all else; `x` is (batch, channels, ...)."""
    channels = x.to(torch.float64).transpose(0, 1).flatten(1)
    return float(channels.var(1, unbiased=False).mean())


def _norm_inputs(root: nn.Module, norms: Mapping[str, nn.Module], call: Call) -> dict[str, Tensor]:
    """The first input of each layer in one forward, in the order in which the layers are called."""
    inputs: dict[str, Tensor] = {}

    def watch(stack: ExitStack, path: str, norm: nn.Module) -> None:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs.setdefault(path, args[0].detach().clone())

        stack.callback(norm.register_forward_pre_hook(hook).remove)

    with ExitStack() as stack:
        for path, norm in norms.items():
            watch(stack, path, norm)
        copied = call.copy()
        root(*copied.args, **copied.kwargs)
    return inputs
