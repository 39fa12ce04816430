"""Dropout before a batch normalisation: in training it raises the variance that the layer learns,
in eval it does not.

Li, Chen, Hu and Yang, "Understanding the Disharmony between Dropout and Batch Normalization by
Variance Shift" (arXiv:1801.05134). The means may agree perfectly: this is a warning of its own.
Does not know layers that normalise by batch without being one of torch's.
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

_DRAWS = 16
_SHIFT = 0.02  # smaller ones are not worth a warning
_ERRORS = 4.0  # standard errors that a shift must exceed


@dataclass(frozen=True)
class Shift:
    """The variance that `path`, a batch normalisation, meets in training over that in eval."""

    path: str
    ratio: float

    @property
    def sentence(self) -> str:
        """What it does to the network."""
        return (
            f"it feeds the batch normalisation {self.path}, whose input has {self.ratio:.2f} times"
            " the variance in training that it has in eval: the statistics learnt are not those of"
            " eval"
        )


def batch_norms(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers that normalise by statistics learnt in training, by path."""
    return {
        path: part
        for path, part in modules.items()
        if isinstance(part, _BatchNorm) and part.track_running_stats
    }


def shift(
    network: Network,
    site: nn.Module,
    norms: Mapping[str, nn.Module],
    sample: Mapping[str, Tensor],
) -> Shift | None:
    """The first batch normalisation that the site's noise reaches, if it shifts the variance
    there.
    """
    held = IsolatedSite(network, site, Call.of((), sample))
    with held.ready():
        still = _inputs(network.module, norms, held.call)
        site.training = True
        noisy = [_inputs(network.module, norms, held.call) for _ in range(_DRAWS)]
    for path, quiet in still.items():
        inputs = [found[path] for found in noisy if path in found]
        if all(x.shape == quiet.shape for x in inputs) and any(
            not torch.equal(x, quiet) for x in inputs
        ):
            return _shift(path, quiet, inputs)
    return None


def _shift(path: str, quiet: Tensor, inputs: list[Tensor]) -> Shift | None:
    expected = _variance(quiet)
    if expected == 0 or len(inputs) < 2:
        return None
    ratios = torch.tensor([_variance(x) / expected for x in inputs], dtype=torch.float64)
    ratio, error = float(ratios.mean()), float(ratios.std()) / len(inputs) ** 0.5
    return Shift(path, ratio) if abs(ratio - 1) > max(_SHIFT, _ERRORS * error) else None


def _variance(x: Tensor) -> float:
    """The mean over channels of the variance that a batch normalisation takes."""
    channels = x.to(torch.float64).transpose(0, 1).flatten(1)
    return float(channels.var(1, unbiased=False).mean())


def _inputs(root: nn.Module, norms: Mapping[str, nn.Module], call: Call) -> dict[str, Tensor]:
    """The first input of each layer, in the order in which they are called."""
    seen: dict[str, Tensor] = {}

    def watch(stack: ExitStack, path: str, norm: nn.Module) -> None:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.setdefault(path, args[0].detach().clone())

        stack.callback(norm.register_forward_pre_hook(hook).remove)

    with ExitStack() as stack:
        for path, norm in norms.items():
            watch(stack, path, norm)
        again = call.again()
        root(*again.args, **again.kwargs)
    return seen
