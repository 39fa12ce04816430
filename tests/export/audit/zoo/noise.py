"""Noise that is no mask: Gaussian, uniform, rounding at random, the wrong affine pair of
AlphaDropout.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gaussian(nn.Module):
    """Srivastava et al. 2014, section 10: multiplies by N(1, p / (1 - p))."""

    def __init__(self, p: float = 0.3, *, mean: float = 1.0) -> None:
        super().__init__()
        self.p, self.mean = p, mean

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (self.mean + torch.randn_like(x) * math.sqrt(self.p / (1 - self.p)))


class Additive(nn.Module):
    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return x + (0.5 * torch.randn_like(x) + self.bias) if self.training else x


class Uniform(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.empty_like(x).uniform_(0.5, 1.5) if self.training else x


class Concrete(nn.Module):
    """Gal et al. 2017: a relaxed mask, divided by 1 - p; its mean is 1 - p only for sharp masks."""

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.logit, self.temperature = nn.Parameter(torch.tensor(-1.5)), temperature

    def forward(self, x: Tensor) -> Tensor:
        p = self.logit.sigmoid()
        if not self.training:
            return x
        u = torch.rand_like(x).clamp(1e-6, 1 - 1e-6)
        dropped = ((self.logit + u.log() - (1 - u).log()) / self.temperature).sigmoid()
        return x * (1 - dropped) / (1 - p)


class Binarised(nn.Module):
    """Draws with probabilities that are the data."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.bernoulli(x.sigmoid()) if self.training else x.sigmoid()


class WrongAlpha(nn.Module):
    """AlphaDropout that drops to 0 as ordinary dropout does and keeps the affine repair."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.p, self.offset = 0.2, offset

    def forward(self, x: Tensor) -> Tensor:
        return F.alpha_dropout(x, self.p, self.training) + (self.offset if self.training else 0.0)


class Always(nn.Module):
    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p)


class Gumbel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gumbel_softmax(x)


class ShakeShake(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        share = torch.rand(x.shape[0], 1, 1) if self.training else 0.5
        return self.a(x) * share + self.b(x) * (1 - share)


class Reseeded(nn.Module):
    """Seeds the global generator in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            torch.manual_seed(0)
        return F.dropout(x, 0.2, self.training)
