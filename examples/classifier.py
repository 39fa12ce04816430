"""A module of your own, as `evalmode export` and `evalmode audit` take it: what builds it, and
sample inputs.

evalmode export examples.classifier:build --inputs examples.classifier:inputs --name classifier
evalmode audit examples.classifier:build --inputs examples.classifier:inputs
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Token ids (B, T) and a mask (B, T) -> logits (B, 3), by the mean of what an encoder layer
    says.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 16)
        self.encoder = nn.TransformerEncoderLayer(
            16, nhead=2, dim_feedforward=32, dropout=0.1, batch_first=True
        )
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The logits of every row."""
        weights = mask / mask.sum(1, keepdim=True)
        hidden = self.encoder(self.embedding(ids), src_key_padding_mask=mask == 0)
        # a product, not a sum: its kernel gives one row its own bits
        pooled = (weights[:, None] @ hidden)[:, 0]
        logits: Tensor = self.head(self.dropout(pooled))
        return logits


def build() -> nn.Module:
    """The module, with its trained weights if it had any."""
    return Classifier()


def inputs() -> list[dict[str, Tensor]]:
    """Two samples: the axes whose sizes differ between them are the ones that vary."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "ids": torch.randint(100, (rows, length), generator=generator),
            "mask": torch.ones(rows, length).tril(length // 2),
        }
        for rows, length in ((3, 8), (2, 12))
    ]
