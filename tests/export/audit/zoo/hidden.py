"""Dropouts that are hard to find, or easy to forget."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class InAList(nn.Module):
    """A dropout that `eval()` does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Dropout(0.3)]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](x)


class Stubborn(nn.Dropout):
    """Monte Carlo dropout: `eval()` does nothing."""

    def train(self, mode: bool = True) -> Stubborn:
        return super().train(True)


class Shut(nn.Dropout):
    """Never in training mode."""

    def train(self, mode: bool = True) -> Shut:
        return super().train(False)


class Several(nn.Module):
    """Several tensors in, a tuple and a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.p = 0.25

    def forward(self, a: Tensor, b: Tensor, *, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        return F.dropout(a, self.p, self.training) * scale, {
            "b": F.dropout(b, self.p, self.training)
        }


class CallsSeveral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Several()

    def forward(self, x: Tensor) -> object:
        return self.inner(x, x + 1, scale=2.0)


class Twice(nn.Module):
    """One dropout, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.linear = nn.Dropout(0.2), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(self.drop(x)))


class Hidden(nn.Module):
    """Takes its rate from a dropout that it never calls, as attention modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout.p, self.training)


class Forgotten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Cast(nn.Module):
    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.to(self.dtype))


class Scattered(nn.Module):
    """Zeroes columns, chosen without replacement."""

    def __init__(self, *, scaled: bool) -> None:
        super().__init__()
        self.p, self.scaled = 0.25, scaled

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        x = x / 0.75 if self.scaled else x.clone()
        x[:, :, torch.randperm(16)[:4]] = 0.0
        return x
