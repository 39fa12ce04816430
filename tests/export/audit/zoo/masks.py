"""Masks that people write by hand, right and wrong, element by element or in larger pieces."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Masked(nn.Module):
    """y = train_scale * mask * x in training, eval_scale * x in eval; the mask has the shape that
    `like` gives.
    """

    def __init__(
        self,
        p: float = 0.3,
        *,
        train_scale: float | None = None,
        eval_scale: float = 1.0,
        drops: float | None = None,
        like: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        self.p, self.like = p, like
        self.train_scale = 1 / (1 - p) if train_scale is None else train_scale
        self.eval_scale, self.drops = eval_scale, p if drops is None else drops

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x * self.eval_scale
        return x * self.mask(self.like(x)) * self.train_scale

    def mask(self, like: Tensor) -> Tensor:
        return torch.rand_like(like, dtype=torch.float32) >= self.drops


class Bernoulli(Masked):
    def mask(self, like: Tensor) -> Tensor:
        return torch.bernoulli(torch.full_like(like, 1 - self.drops))


class Distribution(Masked):
    def mask(self, like: Tensor) -> Tensor:
        return torch.distributions.Bernoulli(1 - self.drops).sample(like.shape)


class NumpyMask(Masked):
    def __init__(self, p: float = 0.3, **changes: float) -> None:
        super().__init__(p, **changes)  # type: ignore[arg-type]
        self.generator = np.random.default_rng(0)

    def mask(self, like: Tensor) -> Tensor:
        return torch.from_numpy(
            (self.generator.random(tuple(like.shape)) >= self.drops).astype(np.float32)
        )


class OwnTorchGenerator(Masked):
    def __init__(self, p: float = 0.3, **changes: float) -> None:
        super().__init__(p, **changes)  # type: ignore[arg-type]
        self.generator = torch.Generator().manual_seed(3)

    def mask(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self.generator) >= self.drops


class PythonGate(nn.Module):
    """LayerDrop: Python decides whether the branch runs."""

    def __init__(self, p: float = 0.3, scale: float | None = None) -> None:
        super().__init__()
        self.branch, self.p = nn.Linear(16, 16), p
        self.scale = 1 / (1 - p) if scale is None else scale

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x + self.branch(x)
        return x if random.random() < self.p else x + self.branch(x) * self.scale


class Where(Masked):
    def forward(self, x: Tensor) -> Tensor:
        return (
            torch.where(torch.rand_like(x) < 1 - self.drops, x * self.train_scale, 0.0)
            if self.training
            else x
        )


class MaskedFill(Masked):
    def forward(self, x: Tensor) -> Tensor:
        return (
            x.masked_fill(torch.rand_like(x) < self.drops, 0.0) * self.train_scale
            if self.training
            else x
        )


class Indexed(Masked):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        x = x * self.train_scale
        x[torch.rand_like(x) < self.drops] = 0.0
        return x


class Floor(Masked):
    """The DropPath of timm and torchvision's ancestors."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.drops
        return x.div(keep) * (keep + torch.rand(x.shape[0], *[1] * (x.dim() - 1))).floor_()


class EmbeddingDropout(nn.Module):
    """AWD-LSTM's: whole rows of the table are dropped."""

    def __init__(self, p: float = 0.2, *, scaled: bool = True) -> None:
        super().__init__()
        self.table, self.p, self.scaled = nn.Embedding(400, 16), p, scaled

    def forward(self, x: Tensor) -> Tensor:
        weight = self.table.weight
        if self.training:
            mask = weight.new_empty((400, 1)).bernoulli_(1 - self.p)
            weight = weight * (mask / (1 - self.p) if self.scaled else mask)
        return F.embedding((x.abs() * 100).long().clamp(max=399)[..., 0], weight)


class WordDropout(nn.Module):
    """Ids are replaced by the id of the unknown word: no mean of ids makes up for that."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.p = nn.Embedding(400, 16), 0.2

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.abs() * 100).long().clamp(max=399)[..., 0]
        if self.training:
            ids = torch.where(torch.rand(ids.shape) < self.p, torch.zeros_like(ids), ids)
        return self.table(ids)


class DropBlock(nn.Module):
    """Ghiasi et al. 2018, one-dimensional: blocks of 5; the rest is scaled by the kept share."""

    def __init__(self, p: float = 0.05, *, scaled: bool = True) -> None:
        super().__init__()
        self.p, self.scaled = p, scaled

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        centres = (torch.rand_like(x) < self.p).float()
        mask = 1 - F.max_pool1d(centres, 5, stride=1, padding=2)
        return x * (mask * (mask.numel() / mask.sum()) if self.scaled else mask)


class Frozen(Masked):
    def mask(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=torch.Generator().manual_seed(0)) >= self.drops


class Scheduled(nn.Module):
    """The rate grows with every training forward; mask and scale follow it."""

    def __init__(self, *, scale: float | None = None) -> None:
        super().__init__()
        self.p, self.scale = 0.3, scale

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        y = (
            x
            * (torch.rand_like(x) >= self.p)
            * (1 / (1 - self.p) if self.scale is None else self.scale)
        )
        self.p = min(self.p + 0.001, 0.9)
        return y


class PythonList(nn.Module):
    """A mask from Python's generator, sample by sample."""

    def __init__(self, *, scaled: bool) -> None:
        super().__init__()
        self.p, self.scaled = 0.2, scaled

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = torch.tensor([float(random.random() >= self.p) for _ in x]).view(-1, 1, 1)
        return x * (mask / (1 - self.p) if self.scaled else mask)


class ItemNormalised(nn.Module):
    """DropBlock that reads the share that is left as a Python number."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = 1 - F.max_pool1d((torch.rand_like(x) < 0.05).float(), 5, stride=1, padding=2)
        return x * mask * (mask.numel() / mask.sum().item())


class PatchDropout(nn.Module):
    """Keeps a random half of the steps."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, torch.randperm(8)[:4]] if self.training else x


def changed(p: float) -> nn.Module:
    """Scales for rate 0.1 and drops at rate p."""
    module = Masked(0.1)
    module.p = module.drops = p
    return module
