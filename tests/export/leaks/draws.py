"""Randomness that people write themselves: masks and noise from every generator, and what only
looks random.
"""

from __future__ import annotations

import os
import random
import secrets
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from tests.export.leaks import helper
from tests.export.leaks.case import (
    BAKED,
    CLEAN,
    DRAWS,
    DROPS,
    ESCAPED,
    Answer,
    Case,
    Does,
    between,
    does,
)

HALF = torch.full((4,), 0.5)


def always(name: str, answer: Answer, **held: object) -> Case:
    """What draws whatever its mode is."""
    return Case(name=name, make=does(answer, **held), in_eval=DRAWS, in_train=DROPS)


def gated(name: str, answer: Answer, **held: object) -> Case:
    """What draws in training alone."""
    return Case(name=name, make=does(lambda m, x: answer(m, x) if m.training else x, **held))


def keep(mask: object) -> Tensor:
    return torch.as_tensor(np.asarray(mask), dtype=torch.float32)


def uniform_in_place(m: nn.Module, x: Tensor) -> Tensor:
    return x * x.new_empty(x.shape).uniform_().ge(0.5)


def cached(m: Does, x: Tensor) -> Tensor:
    if m.mask is None:
        m.mask = torch.bernoulli(m.chances)
    return x * m.mask


def counted(m: Does, x: Tensor) -> Tensor:
    m.calls += 1
    return x * m.calls


def moving(m: Does, x: Tensor) -> Tensor:
    m.mean.mul_(0.9).add_(0.1 * x.mean())
    return x - m.mean


def reseeded(m: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(7)
    return x * torch.rand(4)


def own_generator(m: nn.Module, x: Tensor) -> Tensor:
    if not hasattr(m, "own"):
        m.own = torch.Generator().manual_seed(1)
    return x * torch.rand(4, generator=m.own)


class Noise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return torch.dropout(x, 0.5, True)


@torch.library.custom_op("leaks::noise", mutates_args=())
def custom_noise(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


@custom_noise.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class NoisyCall(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + torch.randn(4)


class TwoAnswers(nn.Linear):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return {"logits": logits, "noisy": logits + torch.randn(4)}


def checkpointed(m: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(F.dropout, x, use_reentrant=False)


def parametrized() -> nn.Module:
    network = between(nn.Linear(4, 4))
    register_parametrization(network[1], "weight", nn.Dropout())  # type: ignore[index]
    return network


def hooked() -> nn.Module:
    network = between(nn.ReLU())
    network[1].register_forward_hook(lambda module, inputs, output: F.dropout(output))  # type: ignore[index]
    return network


def constructed() -> nn.Module:
    network = between(Does(lambda m, x: x * m.masks[0]))
    network[1].masks = [torch.bernoulli(HALF)]  # type: ignore[index]
    return network


def buffered() -> nn.Module:
    return between(Does(lambda m, x: x * m.mask, mask=torch.bernoulli(HALF)))


def factory(make: Callable[[], nn.Module]) -> str:
    return f"{__name__}:{make.__name__}"


CASES = (
    always("`torch.rand_like(x) < p`", lambda m, x: x * (torch.rand_like(x) < 0.5) / 0.5),
    gated(
        "`torch.rand_like(x) < p`, in training alone",
        lambda m, x: x * (torch.rand_like(x) < 0.5) / 0.5,
    ),
    always("`uniform_()`", uniform_in_place),
    always("`bernoulli_()`", lambda m, x: x * torch.empty_like(x).bernoulli_(0.5)),
    always(
        "`torch.bernoulli` of a buffer", lambda m, x: x * torch.bernoulli(m.chances), chances=HALF
    ),
    always("`normal_()`", lambda m, x: x + torch.empty_like(x).normal_()),
    always("`torch.randn_like(x)`", lambda m, x: x + torch.randn_like(x)),
    gated("`torch.randn_like(x)`, in training alone", lambda m, x: x + torch.randn_like(x)),
    always("`torch.rand(4)`", lambda m, x: x * torch.rand(4)),
    always("`torch.randint`", lambda m, x: x + torch.randint(0, 9, (4,))),
    always("`torch.randperm`", lambda m, x: x[:, torch.randperm(4)]),
    always("`torch.multinomial`", lambda m, x: x + torch.multinomial(x.softmax(-1), 1)),
    always("`torch.poisson`", lambda m, x: torch.poisson(x.exp())),
    always("`exponential_()`", lambda m, x: x + torch.empty_like(x).exponential_()),
    always("`F.gumbel_softmax`", lambda m, x: F.gumbel_softmax(x)),
    always("`F.gumbel_softmax(hard=True)`", lambda m, x: F.gumbel_softmax(x, hard=True)),
    always(
        "`distributions.Bernoulli`",
        lambda m, x: x * torch.distributions.Bernoulli(m.chances).sample(),
        chances=HALF,
    ),
    always(
        "`distributions.Normal(...).rsample()`",
        lambda m, x: torch.distributions.Normal(x, 1.0).rsample(),
    ),
    always("a `torch.Generator` of its own", own_generator),
    Case(
        name="`torch.manual_seed(7)` before each draw",
        make=does(reseeded),
        in_eval=DRAWS,
        though_quiet="the module repeats itself, but its graph would draw",
    ),
    always(
        "`torch.vmap` of a dropout", lambda m, x: torch.vmap(F.dropout, randomness="different")(x)
    ),
    always("a draw in a `torch.autograd.Function`", lambda m, x: Noise.apply(x)),
    always("a dropout in a scripted function", lambda m, x: scripted(x)),
    always("a draw in a custom operator", lambda m, x: custom_noise(x)),
    Case(name="a dropout in a forward hook", make=hooked, in_eval=DRAWS),
    Case(
        name="noise in an overridden `__call__`",
        make=lambda: between(NoisyCall(4, 4)),
        in_eval=DRAWS,
    ),
    Case(
        name="noise in a second answer", make=lambda: between(TwoAnswers(4, 4))[:2], in_eval=DRAWS
    ),
    Case(name="a dropout as a parametrization", make=parametrized),
    always("a dropout under `torch.utils.checkpoint`", checkpointed),
    always(
        "a dropout by `torch.func.functional_call`",
        lambda m, x: functional_call(nn.Dropout(), {}, (x,)),
    ),
    always("NumPy's global generator", lambda m, x: x * keep(np.random.rand(4) < 0.5)),
    gated(
        "NumPy's global generator, in training alone",
        lambda m, x: x * keep(np.random.rand(4) < 0.5),
    ),
    always(
        "a NumPy generator of its own",
        lambda m, x: x * keep(m.held.random(4)),
        held=np.random.default_rng(0),
    ),
    always(
        "a new NumPy generator each time", lambda m, x: x * keep(np.random.default_rng().random(4))
    ),
    Case(
        name="a new NumPy generator each time, seeded",
        make=does(lambda m, x: x * keep(np.random.default_rng(0).random(4))),
        in_train=ESCAPED,
    ),
    always("a gate of Python's `random`", lambda m, x: x if random.random() < 0.5 else -x),
    gated(
        "a gate of Python's `random`, in training alone",
        lambda m, x: x if random.random() < 0.5 else -x,
    ),
    always("a `random.Random` of its own", lambda m, x: x * m.held.random(), held=random.Random(0)),
    always(
        "a generator that another module's function draws from", lambda m, x: x * helper.factor()
    ),
    always("`random.SystemRandom`", lambda m, x: x * random.SystemRandom().random()),
    always("`os.urandom`", lambda m, x: x * keep(list(os.urandom(4)))),
    always("`secrets`", lambda m, x: x + secrets.randbelow(10**6)),
    always("the clock", lambda m, x: x + time.perf_counter_ns() % 10**6),
    always("a counter of its calls", counted, calls=0),
    always("a mean that moves in eval", moving, mean=torch.zeros(())),
    always("a mask that the first forward keeps", cached, mask=None, chances=HALF),
    Case(name="a mask of the constructor, in a list", make=constructed, in_train=ESCAPED),
    Case(
        name="a mask of the constructor, in a list, exported by reference",
        make=constructed,
        in_eval=BAKED,
        in_train=ESCAPED,
        though_quiet="the mask is another one in each process",
        reference=factory(constructed),
    ),
    Case(
        name="a mask of the constructor, in a buffer, exported by reference",
        make=buffered,
        in_eval=CLEAN,
        in_train=ESCAPED,
        reference=factory(buffered),
    ),
    Case(
        name="a dropout while `torch.is_grad_enabled()`",
        make=does(lambda m, x: F.dropout(x, training=torch.is_grad_enabled())),
        in_train=ESCAPED,
    ),
    Case(
        name="a dropout while it is exported",
        make=does(lambda m, x: F.dropout(x, training=torch.compiler.is_exporting())),
        # as served, the runtime deletes the Dropout: parity holds
        in_eval=("training-mode", "repeatability"),
        in_train=ESCAPED,
        though_quiet="the module draws nothing, its graph does",
    ),
    Case(
        name="noise while it is exported",
        make=does(lambda m, x: x + torch.randn_like(x) if torch.compiler.is_exporting() else x),
        in_eval=("stochastic-op", "parity", "repeatability", "batch-invariance"),
        in_train=ESCAPED,
        though_quiet="the module draws nothing, its graph does",
    ),
    Case(
        name="a draw that moves nothing",
        make=does(lambda m, x: torch.where(torch.rand(()) < 0, -x, x)),
        in_eval=DRAWS,
        though_quiet="what it draws changes no answer",
    ),
)
