from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalmode.export.module.forward import plain_forward
from evalmode.export.module.randomness import Unwatched, draws

X = {"x": torch.ones(4, 8)}


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.25)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class CallsDraw(nn.Module):
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
        heads = x.view(1, 2, 4, 4)
        return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.125)


def test_a_quiet_module_draws_nothing() -> None:
    assert draws(Wrapper(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))).eval(), X | {}) == ()


def test_a_functional_dropout_is_named_with_its_module_its_rate_and_its_line() -> None:
    (draw,) = draws(Wrapper(Functional()).eval(), X)
    assert (draw.path, draw.kind, draw.p) == ("inner", "Functional", 0.25)
    assert "dropout" in draw.operator
    assert draw.line.startswith("test_randomness.py:")


def test_a_module_in_training_is_named_with_its_own_rate() -> None:
    module = Wrapper(nn.Dropout(0.125)).eval()
    module.inner.train()
    (draw,) = draws(module, X)
    assert (draw.path, draw.kind, draw.p) == ("inner", "Dropout", 0.125)


def test_attention_with_a_rate_is_found() -> None:
    (draw,) = draws(Attention().eval(), X)
    assert draw.p == 0.125


def test_pythons_and_numpys_generators_are_watched() -> None:
    assert "random's global generator" in draws(Wrapper(CallsDraw(random.random)), X)[0].operator
    assert (
        "numpy.random's global generator"
        in draws(Wrapper(CallsDraw(np.random.rand)), X)[0].operator
    )
    assert draws(Wrapper(CallsDraw(random.random)), X)[0].path == "inner"


class DrawsBesideItsChild(nn.Module):
    def __init__(self, *, before: bool) -> None:
        super().__init__()
        self.inner, self.before = nn.Linear(8, 8), before

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            random.random()
        y = self.inner(x)
        if not self.before:
            random.random()
        return y


@pytest.mark.parametrize("before", [True, False], ids=["before its child", "after its child"])
def test_a_draw_of_pythons_generator_belongs_to_the_module_that_made_it(before: bool) -> None:
    (draw,) = draws(Wrapper(DrawsBesideItsChild(before=before)), X)
    assert (draw.path, draw.kind) == ("inner", "DrawsBesideItsChild")


def test_a_draw_after_the_last_child_belongs_to_the_root() -> None:
    (draw,) = draws(DrawsBesideItsChild(before=False), X)
    assert draw.path == ""


def test_a_draw_outside_of_every_forward_belongs_to_the_root() -> None:
    class Wraps(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            y = super().__call__(x)
            random.random()
            return y

    (draw,) = draws(Wraps(8, 8), X)
    assert draw.path == ""


def test_a_draw_after_a_child_failed_belongs_to_the_parent() -> None:
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            with contextlib.suppress(RuntimeError):
                self.inner(x)
            return F.dropout(x, 0.25)

    (draw,) = draws(Wrapper(Tries()), X)
    assert (draw.path, draw.kind) == ("inner", "Tries")


def test_a_forward_can_be_watched_after_another_one_failed() -> None:
    with pytest.raises(RuntimeError):
        draws(Wrapper(nn.Linear(3, 3)), X)
    assert draws(Wrapper(Functional()), X)[0].path == "inner"


class Unregistered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Dropout(0.125)(x)


def test_a_module_that_no_attribute_leads_to_is_named_by_its_caller() -> None:
    (draw,) = draws(Wrapper(Unregistered()).eval(), X)
    assert (draw.path, draw.kind, draw.p) == ("inner > unregistered", "Dropout", 0.125)


def encoder() -> nn.Module:
    """A torch layer whose fast path reads the training flag of the layer, not of its dropouts."""
    module = nn.TransformerEncoderLayer(8, 2, 16, 0.125, batch_first=True).eval()
    module.dropout1.train()
    return module


def test_a_dropout_that_the_fast_path_of_torch_skips_is_found() -> None:
    (draw,) = draws(Wrapper(encoder()), {"x": torch.ones(2, 3, 8)})
    assert (draw.path, draw.p) == ("inner.dropout1", 0.125)


def test_a_plain_forward_does_not_take_the_fast_path() -> None:
    module, x = encoder(), torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(module(x), module(x)), "the fast path hides the dropout"
    with plain_forward():
        assert not torch.equal(module(x), module(x))


def test_a_plain_forward_restores_gradients_and_the_fast_path_also_after_an_error() -> None:
    inside = []

    def fails() -> None:
        with plain_forward():
            inside.extend([torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert inside == [False, False]
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


class HasBranches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


def test_a_forward_with_a_branch_cannot_be_watched() -> None:
    with pytest.raises(
        Unwatched, match=r"^inner \(HasBranches\): cond .* at test_randomness.py:\d+$"
    ):
        draws(Wrapper(HasBranches()), X)


def test_a_private_torch_generator_is_found() -> None:
    (draw,) = draws(OwnGenerator(), X)
    assert "rand" in draw.operator


def test_watching_leaves_no_hook_behind() -> None:
    before = len(torch.nn.modules.module._global_forward_hooks)
    draws(Functional(), X)
    assert len(torch.nn.modules.module._global_forward_hooks) == before
