"""Dropouts where `.eval()` does not reach them, modes that lie, and branches that a tracer does not
see.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.export.leaks.case import DRAWS, DROPS, ESCAPED, NO_EXPORT, Case, Does, between, does

GLOBAL_DROPOUT = nn.Dropout(0.5)
GLOBAL_NORM = nn.BatchNorm1d(4)


class OnTheClass(nn.Module):
    drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x)


class Plain:
    def __init__(self) -> None:
        self.drop = nn.Dropout(0.5)


class Slots:
    __slots__ = ("drop",)

    def __init__(self) -> None:
        self.drop = nn.Dropout(0.5)


class MonteCarlo(nn.Dropout):
    """Dropout that is meant to stay on."""

    def train(self, mode: bool = True) -> MonteCarlo:
        return super().train(True)


class Frozen(nn.Sequential):
    """A part that is meant to stay off."""

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


class OwnSwitch(nn.Module):
    """Drops by a flag of its own, and says that it does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.training = self.dropping = False

    def train(self, mode: bool = True) -> OwnSwitch:
        self.dropping = mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.dropping)


class DropoutInName(nn.Identity):
    """What is left of a dropout that someone took out."""


class Parent(nn.Module):
    """Drops in its children's stead, by its own flag."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.5, self.linear.training)


def in_a_closure() -> nn.Module:
    drop = nn.Dropout(0.5)
    return between(Does(lambda m, x: drop(x)))


def put_into_eval() -> nn.Module:
    return between(Does(lambda m, x: m.held[0](x), held=[nn.Dropout(0.5).eval()]))


def shared() -> nn.Module:
    drop = nn.Dropout(0.5)
    return nn.Sequential(nn.Linear(4, 4), drop, nn.Linear(4, 4), drop)


def branches(m: nn.Module, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 1e9, lambda x: F.dropout(x), lambda x: x.clone(), (x,))


def if_large(m: nn.Module, x: Tensor) -> Tensor:
    return F.dropout(x) if x.sum() > 1e9 else x


def holds(path: Any, **held: object) -> Any:
    """A module that calls what it holds by a way that `.eval()` does not go."""
    return does(lambda m, x: path(m)(x), **held)


CASES = (
    Case(
        name="a dropout in a list",
        make=holds(lambda m: m.held[0], held=[nn.Dropout()]),
        in_eval=DROPS,
    ),
    Case(
        name="a dropout in a list, put into eval by hand",
        make=put_into_eval,
        in_train=ESCAPED,
        child=lambda network: network[1].held[0],
        one_child=DROPS,
    ),
    Case(
        name="a dropout in a dict",
        make=holds(lambda m: m.held["a"], held={"a": nn.Dropout()}),
        in_eval=DROPS,
    ),
    Case(name="a dropout in a closure", make=in_a_closure, in_eval=DROPS),
    Case(
        name="a dropout in a `functools.partial`",
        make=holds(lambda m: m.held, held=functools.partial(nn.Dropout())),
        in_eval=DROPS,
    ),
    Case(
        name="a dropout in a plain object",
        make=holds(lambda m: m.held.drop, held=Plain()),
        in_eval=DROPS,
    ),
    Case(
        name="a dropout in an object with `__slots__`",
        make=holds(lambda m: m.held.drop, held=Slots()),
        in_eval=DRAWS,
    ),
    Case(name="a dropout on the class", make=lambda: between(OnTheClass()), in_eval=DRAWS),
    Case(
        name="a dropout that is a global", make=does(lambda m, x: GLOBAL_DROPOUT(x)), in_eval=DRAWS
    ),
    Case(
        name="a `BatchNorm1d` that is a global",
        make=does(lambda m, x: GLOBAL_NORM(x)),
        in_eval=NO_EXPORT,
        in_train=ESCAPED,
        though_quiet="torch's exporter finds that its statistics move and are nobody's buffers",
    ),
    Case(
        name="Monte Carlo dropout: `train()` is overridden",
        make=lambda: between(MonteCarlo(0.5)),
        in_eval=DROPS,
    ),
    Case(
        name="a frozen part: `train()` is overridden",
        make=lambda: between(Frozen(nn.Linear(4, 4), nn.Dropout(0.5))),
        in_train=ESCAPED,
        child="1.1",
        one_child=DROPS,
    ),
    Case(
        name="a switch of its own in place of `training`",
        make=lambda: between(OwnSwitch()),
        one_child=DRAWS,
    ),
    Case(
        name="a dropout in a nested `nn.Sequential`",
        make=lambda: nn.Sequential(between(nn.Dropout())),
        child="0.1",
    ),
    Case(name="one dropout in two places", make=shared),
    Case(name="`F.dropout(x, .5, self.linear.training)`", make=Parent, child="linear"),
    Case(
        name="an `nn.Identity` with Dropout in its name",
        make=lambda: between(DropoutInName()),
        in_train=ESCAPED,
    ),
    Case(
        name="`torch.cond` with a dropout in one branch",
        make=does(branches),
        in_eval=DRAWS,
        though_quiet="the branch that was not taken is not seen: unproven",
    ),
    Case(
        name="`if x.sum() > 1e9` before a dropout",
        make=does(if_large),
        in_eval=NO_EXPORT,
        in_train=ESCAPED,
        though_quiet="no input that was tried takes the branch",
    ),
)
