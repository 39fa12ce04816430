"""How a row of the leak matrix is declared: a module, what it reads, and the rules that must refuse
it in each state.

Written down before anything is measured; knows neither the rules nor the exporter.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

Rules: TypeAlias = tuple[str, ...]

CLEAN: Rules = ()
ESCAPED: Rules = ("escaped-module",)
DRAWS: Rules = ("eager-randomness",)
DROPS: Rules = (*ESCAPED, *DRAWS)
BAKED: Rules = ("baked-noise",)
# No rules, but refusals that say so: the module's own forward raises, or torch's exporter does.
DOES_NOT_RUN: Rules = ("does not run",)
NO_EXPORT: Rules = ("cannot be exported",)

ROWS = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
WIDE = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
STEPS = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
VOLUMES = torch.randn(2, 4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(1, 9, (3, 5), generator=torch.Generator().manual_seed(0))

Answer: TypeAlias = Callable[[Any, Tensor], Tensor]
Sample: TypeAlias = Tensor | dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One module in three states: `in_eval`, `in_train`, and `one_child`, which is eval but for
    what `child` names.

    `child` is None for a module that has none; where `one_child` is not given it is as in train.
    `though_quiet` says why a module is refused in eval whose answers do not vary. `reference` is
    the factory to export by in another process too.
    """

    name: str
    make: Callable[[], nn.Module]
    sample: Sample = ROWS
    in_eval: Rules = CLEAN
    in_train: Rules = DROPS
    child: str | Callable[[Any], nn.Module] | None = "1"
    one_child: Rules | None = None
    though_quiet: str = ""
    reference: str = ""

    def expected(self, state: str) -> Rules | None:
        """The rules that must refuse the module in a state; None for a state that it cannot be
        in.
        """
        if state == "one child in train":
            if self.child is None:
                return None
            return self.in_train if self.one_child is None else self.one_child
        return self.in_eval if state == "in eval" else self.in_train

    def module(self, state: str) -> nn.Module:
        """The module, made anew from the same seeds, in a state."""
        seed(0)
        module = self.make()
        module.train(state == "in train")
        if state == "one child in train" and self.child is not None:
            part = (
                module.get_submodule(self.child)
                if isinstance(self.child, str)
                else self.child(module)
            )
            part.train()
        return module


STATES = ("in eval", "in train", "one child in train")


def seed(number: int) -> None:
    """Torch's, NumPy's and Python's global generators."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


class Does(nn.Module):
    """Answers as a function of itself and its input says, and holds what it is given."""

    def __init__(self, answer: Answer, **held: object) -> None:
        super().__init__()
        self.answer = answer
        for name, value in held.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self, x)


def between(part: nn.Module, width: int = 4) -> nn.Module:
    """The part, whose path is `1`, with a linear layer before it and one after it."""
    return nn.Sequential(nn.Linear(width, width), part, nn.Linear(width, width))


def does(answer: Answer, width: int = 4, **held: Any) -> Callable[[], nn.Module]:
    """A factory of such a function between two linear layers; what it holds is made anew for each
    network.
    """
    return lambda: between(Does(answer, **copy.deepcopy(held)), width)
