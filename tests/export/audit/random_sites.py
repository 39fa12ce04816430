"""Random sites whose true gap is known: rate, granularity, implementation, surroundings and mistake
are drawn.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPE = (256, 2, 8)


@dataclass(frozen=True)
class Truth:
    """What a random site really is: `gap` is exact, `drop` the rate at which it really drops."""

    mistake: str
    style: str
    position: str
    grain: str
    drop: float
    gap: float

    @property
    def must_be_found(self) -> bool:
        return abs(self.gap - 1) >= max(self.drop, 0.02) / 4

    @property
    def is_right(self) -> bool:
        return math.isclose(self.gap, 1, rel_tol=1e-12)


GRAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "element": lambda x: x,
    "channel": lambda x: x[:, :, :1],
    "step": lambda x: x[:, :1],
    "sample": lambda x: x[:, :1, :1],
}


def _torch(like: Tensor, keep: float) -> Tensor:
    return torch.rand(like.shape) < keep


def _bernoulli(like: Tensor, keep: float) -> Tensor:
    return torch.empty(like.shape).bernoulli_(keep)


def _numpy(like: Tensor, keep: float) -> Tensor:
    return torch.from_numpy(np.random.random(tuple(like.shape)) < keep)


def _floor(like: Tensor, keep: float) -> Tensor:
    return (torch.rand(like.shape, dtype=torch.float64) + keep).floor().float()


MASKS = {"rand": _torch, "bernoulli_": _bernoulli, "numpy": _numpy, "floor": _floor}
POSITIONS = ("alone", "alone", "before tanh", "in a residual", "on weights", "on attention")


class RandomSite(nn.Module):
    """A dropout with keep rate k, train scale s and eval scale e, at one of several positions in a
    module.
    """

    def __init__(
        self, *, k: float, s: float, e: float, declared: float, mask: str, grain: str, position: str
    ) -> None:
        super().__init__()
        self.k, self.s, self.e, self.p = k, s, e, declared
        self.mask, self.grain, self.position = MASKS[mask], GRAINS[grain], position
        self.linear = nn.Linear(SHAPE[-1], SHAPE[-1])

    def drop(self, x: Tensor) -> Tensor:
        if not self.training:
            return x * self.e
        return x * self.mask(self.grain(x), self.k) * self.s

    def forward(self, x: Tensor) -> Tensor:
        if self.position == "alone":
            return self.drop(x)
        if self.position == "before tanh":
            return self.linear(self.drop(F.gelu(self.linear(x)))).tanh()
        if self.position == "in a residual":
            return x + self.drop(self.linear(x))
        if self.position == "on weights":
            return x @ self.drop(self.linear.weight.expand(SHAPE[1], -1, -1)).mean(0) + 1
        scores = (x @ x.transpose(1, 2)).softmax(-1)
        return self.drop(scores) @ x


MISTAKES = ("none",) * 6 + ("unscaled", "divided by p", "twice", "mask rate", "scale")


def draw_site(rng: random.Random) -> tuple[nn.Module, Truth]:
    """One site and the truth about it. Rates lie between .01 and .9, evenly in their logarithm."""
    p = math.exp(rng.uniform(math.log(0.01), math.log(0.9)))
    style, mistake = rng.choice(("inverted", "classic")), rng.choice(MISTAKES)
    k, scale = 1 - p, 1 / (1 - p)
    if mistake == "unscaled":
        scale = 1.0
    elif mistake == "divided by p":
        scale = 1 / p
    elif mistake == "twice":
        scale = 1 / (1 - p) ** 2
    elif mistake == "mask rate":  # a gap of 1 to 3 margins, where a rate can make it
        k = min(
            max(k * (1 + rng.choice((-1, 1)) * rng.uniform(1, 3) * max(p, 0.02) / 4), 0.02),
            1 - 1e-3,
        )
    elif mistake == "scale":
        scale *= 1 + rng.choice((-1, 1)) * rng.uniform(1, 3) * max(p, 0.02) / 4
    s, e = (scale, 1.0) if style == "inverted" else (1.0, 1 / scale)
    grain = rng.choice(("element", "element", "channel", "step", "sample"))
    position = rng.choice(POSITIONS)
    if position in ("on weights", "on attention"):
        grain = "element"
    module = RandomSite(
        k=k, s=s, e=e, declared=p, mask=rng.choice(list(MASKS)), grain=grain, position=position
    )
    return module, Truth(mistake, style, position, grain, 1 - k, k * s / e)


class Network(nn.Module):
    """Sites side by side, on one input."""

    def __init__(self, sites: list[nn.Module]) -> None:
        super().__init__()
        self.sites = nn.ModuleList(sites)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [site(x) for site in self.sites]
