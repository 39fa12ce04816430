"""The weights with which both networks begin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn


@torch.no_grad()
def initialise(network: nn.Module, *, residual_layers: Sequence[nn.Linear]) -> None:
    """Initialise a network as in GPT-2 (Radford et al. 2019, section 2.3).

    Weights are drawn from N(0, 0.02), and biases are 0. The outputs of `residual_layers` are added
    to the stream. Their weights are divided by the root of their number, so that depth does not
    widen the stream.
    """

    def draw(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, 0.02)
        if isinstance(module, nn.Linear):
            module.bias.zero_()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()

    network.apply(draw)
    for layer in residual_layers:
        layer.weight.div_(math.sqrt(len(residual_layers)))
