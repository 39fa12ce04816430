"""Small networks of either arithmetic, whose outputs are large enough to show a mistake."""

from __future__ import annotations

import torch

from evalmode.model.config import TransformerConfig
from evalmode.model.networks import Network, network_of

# The fields of TransformerConfig with the drop probability of each site.
RATES = (
    "ngram_dropout",
    "embedding_dropout",
    "attention_dropout",
    "residual_dropout",
    "feed_forward_dropout",
)


def small_config(**changes) -> TransformerConfig:
    shape = {
        "vocabulary": 50,
        "labels": 5,
        "positions": 12,
        "width": 16,
        "layers": 2,
        "heads": 2,
        "feed_forward": 32,
    }
    return TransformerConfig(**(shape | changes))


def small_network(**changes) -> Network:
    """A network with large random weights; `changes` are fields of its shape."""
    torch.manual_seed(0)
    network = network_of(small_config(**changes))
    # The outputs of untrained weights are so small that a wrong path could pass as rounding.
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
        network.embedding.table.weight[0].zero_()
    return network
