from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalmode.export.witness import draws

X = {"x": torch.ones(4, 8)}


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.25)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Host(nn.Module):
    def __init__(self, draw: object) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x * float(self.draw())  # type: ignore[operator]


class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.shape, generator=self.generator)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.view(1, 2, 4, 4)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.125)


def test_a_quiet_module_draws_nothing() -> None:
    assert draws(Around(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))).eval(), X | {}) == ()


def test_a_functional_dropout_is_named_with_its_module_its_rate_and_its_line() -> None:
    (draw,) = draws(Around(Functional()).eval(), X)
    assert (draw.path, draw.kind, draw.p) == ("inner", "Functional", 0.25)
    assert "dropout" in draw.operator
    assert draw.line.startswith("test_witness.py:")


def test_a_module_in_training_is_named_with_its_own_rate() -> None:
    module = Around(nn.Dropout(0.125)).eval()
    module.inner.train()
    (draw,) = draws(module, X)
    assert (draw.path, draw.kind, draw.p) == ("inner", "Dropout", 0.125)


def test_attention_with_a_rate_is_found() -> None:
    (draw,) = draws(Attention().eval(), X)
    assert draw.p == 0.125


def test_pythons_and_numpys_generators_are_watched() -> None:
    assert "random's global generator" in draws(Around(Host(random.random)), X)[0].operator
    assert "numpy.random's global generator" in draws(Around(Host(np.random.rand)), X)[0].operator
    assert draws(Around(Host(random.random)), X)[0].path == "inner"


def test_a_private_torch_generator_is_found() -> None:
    (draw,) = draws(OwnGenerator(), X)
    assert "rand" in draw.operator


def test_watching_leaves_no_hook_behind() -> None:
    before = len(torch.nn.modules.module._global_forward_hooks)
    draws(Functional(), X)
    assert len(torch.nn.modules.module._global_forward_hooks) == before
