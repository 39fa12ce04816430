"""Layers with a dropout somewhere inside: attention, recurrence, feed-forward, weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    def __init__(self, p: float = 0.3, *, scale: float = 1.0) -> None:
        super().__init__()
        self.up, self.down, self.p, self.scale = nn.Linear(16, 32), nn.Linear(32, 16), p, scale

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x))
        hidden = F.dropout(hidden, self.p, self.training)
        return torch.tanh(self.down(hidden * self.scale if self.training else hidden)).square()


class TwoRates(nn.Module):
    """Two functional dropouts, the second of them unscaled."""

    def __init__(self, *, second: float) -> None:
        super().__init__()
        self.up, self.down, self.second = nn.Linear(16, 32), nn.Linear(32, 16), second

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(F.dropout(x, 0.2, self.training)))
        if self.training:
            hidden = hidden * (torch.rand_like(hidden) >= 0.4) * self.second
        return torch.sigmoid(self.down(hidden))


class Attention(nn.Module):
    def __init__(self, p: float = 0.2) -> None:
        super().__init__()
        self.qkv, self.p = nn.Linear(16, 48), p

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0)


class AttentionAlways(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.p)


class SelfAttention(nn.Module):
    def __init__(self, *, weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.25, batch_first=True)
        self.weights = weights

    def forward(self, x: Tensor) -> object:
        return self.attention(x, x, x, need_weights=self.weights)


class DropKey(nn.Module):
    """Drops keys by -inf before the softmax, which normalises anew: no scale belongs to it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.p = nn.Linear(16, 48), 0.2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2)
        if self.training:
            scores = scores.masked_fill(torch.rand_like(scores) < self.p, -1e4)
        return scores.softmax(-1) @ v


class BeforeNorm(nn.Module):
    """A mask that is not scaled, and a normalisation in the same module that takes any scale
    out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.p = 0.2

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * (torch.rand_like(x) >= self.p)
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-9)


class WeightDrop(nn.Module):
    """DropConnect: the weights are dropped, not the activations."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.linear, self.p = nn.Linear(16, 16), p

    def forward(self, x: Tensor) -> Tensor:
        weight = F.dropout(self.linear.weight, self.p, self.training)
        return F.linear(x, weight, self.linear.bias).tanh()


class LockedCell(nn.Module):
    """Variational: one mask for all steps of a recurrence (Gal and Ghahramani 2016)."""

    def __init__(self, *, scaled: bool = True) -> None:
        super().__init__()
        self.cell, self.p, self.scaled = nn.GRUCell(16, 16), 0.2, scaled

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 16)
        mask = torch.rand(x.shape[0], 16) >= self.p if self.training else torch.ones(x.shape[0], 16)
        mask = mask / (1 - self.p) if self.training and self.scaled else mask * 1.0
        for step in x.unbind(1):
            state = self.cell(step, state * mask)
        return state


class Zoneout(nn.Module):
    """Keeps the old state where it drops, and mixes the two in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.p = nn.Linear(16, 16), 0.2

    def forward(self, x: Tensor) -> Tensor:
        new = self.step(x)
        if not self.training:
            return self.p * x + (1 - self.p) * new
        return x + F.dropout(new - x, self.p, True) * (1 - self.p)


class DoubleDrop(nn.Module):
    """Squares what it drops: the mean of the square is not the square of the mean, and the site is
    the mask alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.p = 0.2

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training).square()


class SameMaskTwice(nn.Module):
    """A mask is its own square, so that twice the mask needs the scale once."""

    def __init__(self, *, scales: int) -> None:
        super().__init__()
        self.p, self.scales = 0.2, scales

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = (torch.rand_like(x) >= self.p).float()
        if self.scales == 1:
            return x * mask * mask / (1 - self.p)
        scaled = mask / (1 - self.p)
        return x * scaled * scaled


class WeightedSum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, torch.randn_like(x), alpha=0.1) if self.training else x


class HalfInside(nn.Module):
    """Drops in bfloat16 what comes and goes in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x.bfloat16(), 0.05, self.training).float()
