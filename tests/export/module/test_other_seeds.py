"""Under other seeds, code that sets a seed draws other numbers, and the usual ones afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from evalmode.export.module.forward import seeded
from evalmode.export.module.other_seeds import other_seeds


def torch_global() -> float:
    torch.manual_seed(0)
    return float(torch.rand(1))


def torch_generator() -> float:
    return float(torch.rand(1, generator=torch.Generator(device="cpu").manual_seed(3)))


def torch_generator_without_a_seed() -> float:
    return float(torch.rand(1, generator=torch.Generator()))


def numpy_global() -> float:
    np.random.seed(0)
    return float(np.random.rand())


def python_global() -> float:
    random.seed("a")
    return random.random()


def python_generator() -> float:
    generator = random.Random(1)
    generator.seed(b"2")
    return generator.random()


DRAWS: list[Callable[[], float]] = [
    torch_global,
    torch_generator,
    torch_generator_without_a_seed,
    numpy_global,
    python_global,
    python_generator,
    lambda: float(np.random.default_rng(5).random()),
    lambda: float(np.random.default_rng([1, 2]).random()),
    lambda: float(np.random.RandomState(2**32 - 1).rand()),
    lambda: float(np.random.Generator(np.random.PCG64(5)).random()),
    lambda: float(np.random.Generator(np.random.Philox(np.random.SeedSequence(4))).random()),
    lambda: random.Random(4).random(),
]


@pytest.mark.parametrize("draw", DRAWS)
def test_a_seed_in_code_is_replaced_only_inside_the_block(draw: Callable[[], float]) -> None:
    with seeded(0):
        expected = draw()
        with other_seeds():
            assert draw() != expected
            assert draw() == draw(), "the replaced seed is deterministic"
        assert draw() == expected


def test_generators_keep_their_types() -> None:
    with other_seeds():
        assert isinstance(torch.default_generator, torch.Generator)
        assert isinstance(torch.Generator(), torch.Generator)
