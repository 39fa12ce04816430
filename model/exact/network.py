"""The exact classifier: the transformer of model/transformer.py in exact arithmetic.

It differs from that one in what exact arithmetic needs: RMS norms in place of layer norms, ReLU in
place of GELU, and numbers of few bits. It reads the same rows, and drops in the same places.

Shapes: B rows, T positions, G ids a position, D width, C labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evalmode.model.config import TransformerConfig
from evalmode.model.dropout import new_dropout
from evalmode.model.exact.formats import (
    HIDDEN,
    LARGEST,
    LOGITS,
    MASKED,
    NORMED,
    STREAM,
    pooled_format,
)
from evalmode.model.exact.layers import (
    Attention,
    Embedding,
    Linear,
    Pooling,
    RmsNorm,
    dropped,
    freeze,
    keep_of,
)
from evalmode.model.initial_weights import initialise


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them, and dropout after the ReLU.

    The ReLU is the lower bound of the format HIDDEN.
    """

    def __init__(self, config: TransformerConfig, *, output_keep: float) -> None:
        super().__init__()
        bits = config.weight_bits
        self.dropout = new_dropout(config.dropout_kind, config.feed_forward_dropout)
        self.up = Linear(
            config.width, config.feed_forward, reads=NORMED, writes=HIDDEN, weight_bits=bits
        )
        self.down = Linear(
            config.feed_forward,
            config.width,
            reads=HIDDEN,
            writes=STREAM,
            weight_bits=bits,
            input_keep=keep_of(self.dropout),
            output_keep=output_keep,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) of NORMED -> (..., D) of STREAM."""
        return self.down(dropped(self.dropout, self.up(x)))


class Block(nn.Module):
    """One layer: attention and feed-forward. Each reads a norm of the stream and adds to it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_dropout = new_dropout(config.dropout_kind, config.residual_dropout)
        self.feed_forward_dropout = new_dropout(config.dropout_kind, config.residual_dropout)
        self.attention_norm = RmsNorm(config.width)
        self.attention = Attention(
            config.width,
            heads=config.heads,
            positions=config.positions,
            dropout=new_dropout(config.dropout_kind, config.attention_dropout),
            weight_bits=config.weight_bits,
            output_keep=keep_of(self.attention_dropout),
        )
        self.feed_forward_norm = RmsNorm(config.width)
        self.feed_forward = FeedForward(config, output_keep=keep_of(self.feed_forward_dropout))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x of STREAM, (B, T, D) or (B * T, D), and a mask as in Attention -> as x."""
        x = x + dropped(self.attention_dropout, self.attention(self.attention_norm(x), mask))
        return x + dropped(self.feed_forward_dropout, self.feed_forward(self.feed_forward_norm(x)))


class ExactTransformer(nn.Module):
    """The classifier: embedding, blocks, the mean over positions without padding, a linear head.

    `config` has arithmetic="exact". The logits are integers times a power of two for each label,
    and no bit of them depends on padding, other rows, threads or the machine.

        config = TransformerConfig(vocabulary=300, labels=2, positions=128, arithmetic="exact")
        network = ExactTransformer(config).eval()
        logits = network(torch.tensor([[5, 7, 0]]))  # (1, 2)
        network.freeze()  # for the export
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if config.arithmetic != "exact":
            raise ValueError(
                "an ExactTransformer needs a configuration with arithmetic='exact', got"
                f" arithmetic={config.arithmetic!r}"
            )
        self.config = config
        self.embedding = Embedding(
            config.vocabulary,
            config.width,
            positions=config.positions,
            ids_per_position=config.ids_per_position,
            ngram_dropout=new_dropout(config.dropout_kind, config.ngram_dropout),
            dropout=new_dropout(config.dropout_kind, config.embedding_dropout),
        )
        blocks = [Block(config) for _ in range(config.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = RmsNorm(config.width)
        pooled = pooled_format(config.width, weight_bits=config.weight_bits)
        self.pooling = Pooling(positions=config.positions, writes=pooled)
        self.head = Linear(
            config.width,
            config.labels,
            reads=pooled,
            writes=LOGITS,
            weight_bits=config.weight_bits,
        )
        if config.causal:
            future = torch.full((config.positions, config.positions), float(MASKED)).triu(1)
            self.register_buffer("future", future, persistent=False)
            self.future: Tensor
        # All norms read one table of 1 MB.
        for module in self.modules():
            if isinstance(module, RmsNorm):
                module.table = self.norm.table
        residual_layers = []
        for block in blocks:
            residual_layers += [block.attention.out, block.feed_forward.down]
        initialise(self, residual_layers=residual_layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The logits (B, C) of `input_ids`, int64 (B, T) or (B, T, G), 1 <= T <= config.positions.

        `attention_mask`, int64 (B, T), is 0 where a position is padding. Without it a position is
        padding if all of its ids are 0. A row of padding alone has the logits of the head's bias.
        """
        ids = input_ids if input_ids.dim() == 3 else input_ids.unsqueeze(-1)  # (B, T, G)
        # The largest id and not `any`, which takes three operations more in a graph.
        marks = ids.amax(-1) if attention_mask is None else attention_mask  # (B, T)
        # Through a bool: a comparison with 0 takes an operation more in a graph.
        real = marks.bool().to(self.head.weight.dtype)
        return self.head(self.pooling(self.hidden(ids, real), real).squeeze(1))

    def hidden(self, ids: Tensor, real: Tensor) -> Tensor:
        """The output of the last norm: ids (B, T, G), real (B, T), 1 or 0 -> (B, T, D)."""
        # A softmax sees only how far a score is below the best one. So keys that count are raised
        # here, which is one operation less than lowering those of padding.
        mask = (real * -MASKED)[:, None, None, :]  # (B, 1, 1, T)
        if self.config.causal:
            t = ids.shape[1]
            mask = mask + self.future[:t, :t]  # (B, 1, T, T)
        # As a matrix of positions: the exporter then writes a linear layer as one Gemm, and not as
        # a MatMul and an Add.
        x = self.embedding(ids).flatten(0, 1)  # (B * T, D)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x).view(*ids.shape[:2], -1)

    def freeze(self) -> None:
        """Replace all parameters by the rounded ones of the graph, in place.

        The logits keep every bit. The network cannot train any more. Raises ValueError if with
        these weights a sum could exceed 24 bits.
        """
        reach = self.embedding.reach() + sum(
            float(layer.reach().max())
            for name, layer in self.named_modules()
            if isinstance(layer, Linear) and layer.writes == STREAM
        )
        assert STREAM.grid_bits is not None
        reach *= 2.0 ** (STREAM.grid_bits - STREAM.fraction_bits)
        if reach > LARGEST:
            raise ValueError(
                f"the residual stream can reach {reach:,.0f} units, and float32 is exact up to"
                f" {LARGEST:,}: train with fewer layers, a smaller feed-forward or a higher"
                " weight decay"
            )
        freeze(self)
