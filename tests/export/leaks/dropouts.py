"""Every dropout of torch's and of ours, as a module, as a function and as people write it
themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalmode.model.dropout import ClassicDropout, Dropout, fold
from tests.export.leaks.case import (
    CLEAN,
    DOES_NOT_RUN,
    DRAWS,
    ESCAPED,
    IDS,
    IMAGES,
    STEPS,
    VOLUMES,
    WIDE,
    Case,
    Does,
    between,
    does,
)


def in_a_network(part: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: between(part())


def first(part: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The part, then a ReLU: for inputs that no linear layer reads."""
    return lambda: nn.Sequential(nn.Identity(), part(), nn.ReLU())


def folded() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 4), ClassicDropout(0.5), nn.Linear(4, 4))
    fold(network[1], following=[network[2]])  # type: ignore[arg-type]
    return network


class DropPath(nn.Module):
    """Stochastic depth as timm has it: a residual branch is dropped for whole samples."""

    def __init__(self, p: float, *, always: bool = False) -> None:
        super().__init__()
        self.drop_prob, self.always = p, always

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training or self.always):
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.drop_prob)
        return x * keep / (1 - self.drop_prob)


class DropBlock(nn.Module):
    """Drops squares of an image."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        seeds = (torch.rand_like(x) < 0.1).to(x.dtype)
        mask = 1 - F.max_pool2d(seeds, kernel_size=3, stride=1, padding=1)
        return x * mask * mask.numel() / (mask.sum() + 1e-6)


class Embedded(nn.Module):
    """Embedding dropout: whole rows of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.head = Does(lambda m, x: x.mean(1))

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.table.weight
        if self.training:
            weight = weight * weight.new_empty(9, 1).bernoulli_(0.7) / 0.7
        return self.head(F.embedding(ids, weight))


class Zoneout(nn.Module):
    """Keeps a unit's old state by chance in training, on average in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 4)
        for step in x.unbind(1):
            new = self.cell(step, state)
            mask = (torch.rand_like(new) < 0.2).to(x.dtype) if self.training else 0.2
            state = mask * state + (1 - mask) * new
        return state


class DropConnect(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.weight, 0.5, self.training), self.bias)


class LayerDrop(nn.ModuleList):
    """Leaves out whole layers in training."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            if not self.training or torch.rand(()) > 0.3:
                x = layer(x)
        return x


def shake_shake(m: nn.Module, x: Tensor) -> Tensor:
    share = torch.rand(x.shape[0], 1) if m.training else 0.5
    return share * x + (1 - share) * torch.tanh(x)


def locked(m: nn.Module, x: Tensor) -> Tensor:
    return x * F.dropout(torch.ones_like(x[:, :1]), 0.5, m.training)


CASES = (
    Case(name="`nn.Dropout`", make=in_a_network(nn.Dropout)),
    Case(
        name="`nn.Dropout`, in place",
        make=in_a_network(functools.partial(nn.Dropout, inplace=True)),
    ),
    Case(
        name="`nn.Dropout` with p = 0",
        make=in_a_network(functools.partial(nn.Dropout, 0.0)),
        in_train=ESCAPED,
    ),
    Case(
        name="`nn.Dropout` with p = 1",
        make=in_a_network(functools.partial(nn.Dropout, 1.0)),
        in_train=ESCAPED,
    ),
    Case(name="`nn.Dropout1d`", make=in_a_network(nn.Dropout1d), sample=STEPS),
    Case(name="`nn.Dropout2d`", make=first(nn.Dropout2d), sample=IMAGES),
    Case(name="`nn.Dropout3d`", make=first(nn.Dropout3d), sample=VOLUMES),
    Case(name="`nn.AlphaDropout`", make=in_a_network(nn.AlphaDropout)),
    Case(name="`nn.FeatureAlphaDropout`", make=first(nn.FeatureAlphaDropout), sample=IMAGES),
    Case(name="`evalmode.model.dropout.Dropout`", make=in_a_network(Dropout)),
    Case(
        name="`ClassicDropout`, its scale left in eval",
        make=in_a_network(ClassicDropout),
        in_eval=("census",),
        though_quiet="its scale is in the graph: unproven",
    ),
    Case(
        name="`ClassicDropout`, folded",
        make=folded,
        in_eval=("census",),
        in_train=DOES_NOT_RUN,
        though_quiet="it refuses to train, so where it would drop cannot be told: unproven",
    ),
    Case(name="`F.dropout(x)`", make=does(lambda m, x: F.dropout(x)), in_eval=DRAWS),
    Case(
        name="`F.dropout(x, .5, self.training)`",
        make=does(lambda m, x: F.dropout(x, 0.5, m.training)),
    ),
    Case(
        name="`F.dropout(x, .5 if self.training else 0.)`",
        make=does(lambda m, x: F.dropout(x, 0.5 if m.training else 0.0)),
    ),
    Case(name="`F.dropout(x, 0.)`", make=does(lambda m, x: F.dropout(x, 0.0)), in_train=ESCAPED),
    Case(
        name="`F.dropout(x, .001)`",
        make=does(lambda m, x: F.dropout(x, 0.001), width=64),
        sample=WIDE,
        in_eval=DRAWS,
    ),
    Case(
        name="`F.dropout` of a table",
        make=does(lambda m, x: x + F.dropout(m.table), table=torch.ones(4)),
        in_eval=DRAWS,
    ),
    Case(
        name="`F.dropout1d(x)`", make=does(lambda m, x: F.dropout1d(x)), sample=STEPS, in_eval=DRAWS
    ),
    Case(name="`F.alpha_dropout(x)`", make=does(lambda m, x: F.alpha_dropout(x)), in_train=ESCAPED),
    Case(
        name="`F.alpha_dropout(x, training=True)`",
        make=does(lambda m, x: F.alpha_dropout(x, training=True)),
        in_eval=DRAWS,
    ),
    Case(
        name="`F.feature_alpha_dropout(x)`",
        make=does(lambda m, x: F.feature_alpha_dropout(x)),
        in_train=ESCAPED,
    ),
    Case(name="DropPath", make=in_a_network(lambda: DropPath(0.3))),
    Case(
        name="DropPath that ignores `training`",
        make=in_a_network(lambda: DropPath(0.3, always=True)),
        in_eval=DRAWS,
    ),
    Case(name="DropBlock", make=first(DropBlock), sample=IMAGES),
    Case(
        name="LayerDrop", make=in_a_network(lambda: LayerDrop([nn.Linear(4, 4) for _ in range(8)]))
    ),
    Case(name="Shake-shake", make=does(shake_shake)),
    Case(name="embedding dropout", make=Embedded, sample=IDS, child="table", one_child=ESCAPED),
    Case(name="locked dropout", make=does(locked), sample=STEPS),
    Case(name="zoneout", make=Zoneout, sample=STEPS[:, :2], child="cell", one_child=ESCAPED),
    Case(name="DropConnect", make=in_a_network(lambda: DropConnect(4, 4))),
    Case(
        name="Gaussian dropout",
        make=does(lambda m, x: x * (1 + torch.randn_like(x)) if m.training else x),
        in_eval=CLEAN,
    ),
)
