"""The network that a configuration describes, in either arithmetic."""

from __future__ import annotations

from typing import TypeAlias

from evalmode.model.config import TransformerConfig
from evalmode.model.exact.network import ExactTransformer
from evalmode.model.transformer import Transformer

Network: TypeAlias = Transformer | ExactTransformer


def network_of(config: TransformerConfig) -> Network:
    """A new network of this shape: the caller's random state decides its weights."""
    return ExactTransformer(config) if config.arithmetic == "exact" else Transformer(config)
