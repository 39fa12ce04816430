"""The network of one's own that the bench exports: four layers of width 256, 2 ms a run.

evalmode export network:build --inputs network:inputs
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LAYERS, WIDTH, HEADS, LABELS = 4, 256, 4, 8
VOCABULARY = 8192


class Encoder(nn.Module):
    """Ids (B, T) and a mask (B, T) of 0 and 1 -> logits (B, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.1, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, LABELS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits of the mean of the positions that count."""
        hidden = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        mask = attention_mask.to(hidden.dtype)
        weights = mask / mask.sum(1, keepdim=True)
        pooled = (weights[:, None] @ hidden)[:, 0]  # (B, WIDTH)
        logits: Tensor = self.head(self.dropout(pooled))
        return logits


def build() -> nn.Module:
    """The network with seeded random weights: speed does not depend on their values."""
    torch.manual_seed(0)
    return Encoder()


def inputs() -> list[dict[str, Tensor]]:
    """Two samples: rows and length vary."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(1, VOCABULARY, (rows, length), generator=generator),
            "attention_mask": torch.ones(rows, length, dtype=torch.int64).tril(length // 2),
        }
        for rows, length in ((3, 8), (2, 12))
    ]
