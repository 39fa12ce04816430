"""Run code under other seeds, also code that seeds the generators itself.

A factory that begins with `torch.manual_seed(0)` makes the same network each time, and draws the
same constants. Inside `other_seeds`, every seed that code passes to torch, NumPy or Python is
replaced by another one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

# Added to every seed. Seeds of the same code seldom differ by this prime, so the sum is most likely
# none of them.
_OFFSET = 7919
_NUMPY_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64", "RandomState")
_TORCH_GENERATOR = torch.Generator


@contextmanager
def other_seeds() -> Iterator[None]:
    """Replace every seed that code passes to torch, NumPy or Python inside of the block.

    Two kinds of seeds stay as they are: those of generators that are not torch's, NumPy's or
    Python's, and those of functions imported by name before (`from torch import manual_seed`).
    """
    seed = random.Random.seed

    def seed_otherwise(self: random.Random, a: Any = None, version: int = 2) -> None:
        seed(self, _other_seed(a), version)

    replacements: list[tuple[Any, str, Any]] = [
        (torch, "manual_seed", _with_other_seed(torch.manual_seed)),
        (torch.random, "manual_seed", _with_other_seed(torch.random.manual_seed)),
        (torch.cuda, "manual_seed", _with_other_seed(torch.cuda.manual_seed)),
        (torch.cuda, "manual_seed_all", _with_other_seed(torch.cuda.manual_seed_all)),
        (torch, "Generator", _Generator),
        (np.random, "seed", _with_other_seed(np.random.seed)),
        (np.random, "default_rng", _with_other_seed(np.random.default_rng)),
        (np.random, "SeedSequence", _SeedSequence),
        (random, "seed", _with_other_seed(random.seed)),
        (random.Random, "seed", seed_otherwise),
    ]
    replacements += [
        (np.random, name, _subclass_with_other_seed(getattr(np.random, name)))
        for name in _NUMPY_GENERATORS
    ]
    with ExitStack() as stack:
        for owner, name, replacement in replacements:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield


def _other_seed(seed: Any) -> Any:
    """Another seed of the same type. None, or a bit generator, is returned as it is."""
    if isinstance(seed, str):
        return f"{seed}{_OFFSET}"
    if isinstance(seed, bytes):
        return seed + str(_OFFSET).encode()
    if isinstance(seed, list):
        return [*seed, _OFFSET]
    if isinstance(seed, int | float | np.integer) and not isinstance(seed, bool):
        # NumPy refuses seeds of 2**32 and above.
        return seed + _OFFSET if seed < 2**32 - _OFFSET else seed - _OFFSET
    return seed


def _with_other_seed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called with another seed in place of its first argument."""

    def call(seed: Any = None, *args: Any, **kwargs: Any) -> Any:
        if seed is None:
            return function(*args, **kwargs)
        return function(_other_seed(seed), *args, **kwargs)

    return call


def _subclass_with_other_seed(kind: type[Any]) -> type[Any]:
    """A subclass that is made with another seed in place of its first argument."""

    def initialise(self: Any, seed: Any = None, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, _other_seed(seed), *args, **kwargs)

    return type(kind.__name__, (kind,), {"__init__": initialise})


class _SeedSequence(np.random.SeedSequence):
    def __init__(self, entropy: Any = None, **kwargs: Any) -> None:
        super().__init__(_other_seed(entropy), **kwargs)


class _GeneratorType(type(torch.Generator)):  # type: ignore[misc]
    """Makes torch's generators instances of `_Generator`, also those made before the block."""

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _TORCH_GENERATOR)


class _Generator(torch.Generator, metaclass=_GeneratorType):
    """torch's generator under other seeds, also in place of its default seed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        super().manual_seed(_other_seed(self.initial_seed() % 2**31))

    def manual_seed(self, seed: int) -> torch.Generator:
        super().manual_seed(_other_seed(seed))
        return self
