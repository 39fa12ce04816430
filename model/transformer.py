"""The network: a pre-norm transformer that classifies a sequence of ids.

It drops in five sites, and each rate may be 0. The first four are those of Vaswani et al. 2017,
section 5.4, and of GPT-2:

    embedding_dropout       after the embedding
    attention_dropout       on the attention weights, after mask and softmax
    residual_dropout        on each residual branch, before it is added to the stream
    feed_forward_dropout    in the feed-forward layer, after its activation
    ngram_dropout           on the single ids of a position, if a position is a mean of several

Shapes: B rows, T positions, G ids a position, D width, H heads, K = D / H, C labels, V ids.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalmode.model.config import TransformerConfig
from evalmode.model.dropout import ClassicDropout, fold, new_dropout
from evalmode.model.initial_weights import initialise


class Embedding(nn.Module):
    """Ids to vectors: the mean of a position's G table rows, plus a learned position vector."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.vocabulary, config.width, padding_idx=0)
        self.positions = nn.Embedding(config.positions, config.width)
        self.ngram_dropout = new_dropout(config.dropout_kind, config.ngram_dropout)
        self.dropout = new_dropout(config.dropout_kind, config.embedding_dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, T, G) int64 -> (B, T, D)."""
        b, t, g = ids.shape
        weights = self.ngram_dropout(self.table.weight.new_full((b, t, 1, g), 1.0 / g))
        # Both branches are weights @ table[ids], (B, T, D).
        if self.training:
            x = _WeightedRows.apply(ids, weights, self.table.weight)  # type: ignore[no-untyped-call]
        else:
            # A matrix product and not a sum over G: its order of addition does not depend on the
            # number of rows.
            x = (weights @ self.table(ids)).squeeze(2)
        return self.dropout(x + self.positions.weight[:t])


class _WeightedRows(torch.autograd.Function):
    """`weights @ table[ids]` for training, equal to the eval form up to rounding.

    ids (B, T, G) int64, weights (B, T, 1, G), table (V, D) -> (B, T, D). The (B, T, G, D) rows are
    never in memory, and their gradient is scattered into the table in one pass: 2.0 ms instead of
    5.9 for 128 rows of 8 positions and 16 ids on one CPU thread. The weights are no parameters and
    get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weights: Tensor, table: Tensor) -> Tensor:
        b, t, g = ids.shape
        ctx.save_for_backward(ids, weights)
        ctx.rows = len(table)
        bags = F.embedding_bag(
            ids.view(-1, g), table, per_sample_weights=weights.view(-1, g), mode="sum"
        )
        return bags.view(b, t, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        ids, weights = ctx.saved_tensors
        row_gradients = weights.transpose(2, 3) * grad.unsqueeze(2)  # (B, T, G, D)
        table_gradient = grad.new_zeros(ctx.rows, grad.shape[-1])  # (V, D)
        table_gradient.index_add_(0, ids.flatten(), row_gradients.flatten(0, 2))
        # Id 0 is padding, which must stay the zero vector.
        table_gradient[0] = 0.0
        return None, None, table_gradient


class Attention(nn.Module):
    """Multi-head scaled dot-product attention with dropout on its weights."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.scale = 1.0 / math.sqrt(config.width // config.heads)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.dropout = new_dropout(config.dropout_kind, config.attention_dropout)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """x (B, T, D), visible (B, 1, 1 or T, T) bool -> (B, T, D)."""
        b, t, d = x.shape
        q, k, v = (
            self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )  # (B, H, T, K)
        scores = (q * self.scale) @ k.transpose(-2, -1)  # (B, H, T, T)
        # The lowest finite number and not -inf: the softmax of a row without any visible position
        # is then an average instead of 0 / 0.
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        mixed = self.dropout(scores.softmax(dim=-1)) @ v  # (B, H, T, K)
        return self.out(mixed.transpose(1, 2).reshape(b, t, d))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, and dropout after the GELU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.feed_forward)
        self.down = nn.Linear(config.feed_forward, config.width)
        self.dropout = new_dropout(config.dropout_kind, config.feed_forward_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.down(self.dropout(F.gelu(self.up(x))))


class Block(nn.Module):
    """One layer: attention and feed-forward. Each reads a norm of the stream and adds to it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.attention_dropout = new_dropout(config.dropout_kind, config.residual_dropout)
        self.feed_forward_norm = nn.LayerNorm(config.width)
        self.feed_forward = FeedForward(config)
        self.feed_forward_dropout = new_dropout(config.dropout_kind, config.residual_dropout)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """x (B, T, D), visible (B, 1, 1 or T, T) bool -> (B, T, D)."""
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), visible))
        return x + self.feed_forward_dropout(self.feed_forward(self.feed_forward_norm(x)))


class Transformer(nn.Module):
    """The classifier: embedding, blocks, the mean over positions without padding, a linear head.

    network = Transformer(TransformerConfig(vocabulary=300, labels=2, positions=128)).eval()
    logits = network(torch.tensor([[5, 7, 0]]))  # (1, 2)
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        blocks = [Block(config) for _ in range(config.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.labels)
        residual_layers = []
        for block in blocks:
            residual_layers += [block.attention.out, block.feed_forward.down]
        initialise(self, residual_layers=residual_layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The logits (B, C) of `input_ids`, int64 (B, T) or (B, T, G), 1 <= T <= config.positions.

        `attention_mask`, int64 (B, T), is 0 where a position is padding. Without it a position is
        padding if all of its ids are 0. Padding changes the logits of a row only by rounding, and a
        row of padding alone has finite logits.
        """
        ids = input_ids if input_ids.dim() == 3 else input_ids.unsqueeze(-1)  # (B, T, G)
        real = (ids != 0).any(-1) if attention_mask is None else attention_mask != 0  # (B, T) bool
        x = self.hidden(ids, real)  # (B, T, D)
        weights = real.to(x.dtype)
        weights = (weights / weights.sum(-1, keepdim=True).clamp(min=1.0)).unsqueeze(1)  # (B, 1, T)
        # A matrix product instead of a sum, and the head on a 3-D tensor: for a batch of one row
        # ONNX Runtime's sum and its 2-D product use other kernels, and the row would get other bits
        # than in a larger batch.
        return self.head(weights @ x).squeeze(1)  # (B, C)

    def hidden(self, ids: Tensor, real: Tensor) -> Tensor:
        """The output of the last norm: ids (B, T, G), real (B, T) bool -> (B, T, D)."""
        visible = real[:, None, None, :]  # (B, 1, 1, T)
        if self.config.causal:
            t = ids.shape[1]
            past = torch.ones(t, t, dtype=torch.bool, device=ids.device).tril()  # (T, T)
            visible = visible & past  # (B, 1, T, T)
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, visible)
        return self.norm(x)

    def fold_classic_dropout(self) -> None:
        """Fold the eval factor of each ClassicDropout into the weights beside it, in place.

        Afterwards the network gives the same logits up to rounding, without a multiplication by the
        keep probability, and cannot train. A network of inverted dropouts is left as it is.
        """
        if self.config.dropout_kind != "classic":
            return
        # Position vectors are added after `ngram_dropout`, so they take only the factor of the
        # embedding's dropout. The table takes both.
        fold(_classic(self.embedding.ngram_dropout), preceding=[self.embedding.table])
        fold(
            _classic(self.embedding.dropout),
            preceding=[self.embedding.table, self.embedding.positions],
        )
        for block in self.blocks:
            assert isinstance(block, Block)
            fold(_classic(block.attention.dropout), following=[block.attention.out])
            fold(_classic(block.attention_dropout), preceding=[block.attention.out])
            fold(_classic(block.feed_forward.dropout), following=[block.feed_forward.down])
            fold(_classic(block.feed_forward_dropout), preceding=[block.feed_forward.down])


def _classic(dropout: nn.Module) -> ClassicDropout:
    assert isinstance(dropout, ClassicDropout)
    return dropout
